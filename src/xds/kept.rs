//! Received bytes as they lie in memory: packed, as only `/config_dump` and a file ask for them.
//!
//! Resources of a kind are alike, so each is packed against one of its kind: a cluster of a kilobyte becomes a tenth of that.

use std::sync::Arc;

use bytes::Bytes;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// What deflate can look back to.
const WINDOW: usize = 32 << 10;

/// The bytes of a resource; clones share them.
#[derive(Debug, Clone)]
pub struct Kept(Form);

#[derive(Debug, Clone)]
enum Form {
    Plain(Bytes),
    Packed { packed: Arc<[u8]>, length: usize, like: Like },
}

/// What resources of a kind are packed against: the end of one of them.
#[derive(Debug, Clone)]
pub(super) struct Like(Arc<[u8]>);

impl Like {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(bytes[bytes.len().saturating_sub(WINDOW)..].into())
    }
}

/// Packs one after the other; its tables are some 300 KB.
pub(super) struct Packer {
    deflate: Compress,
    inflate: Decompress,
}

impl Kept {
    /// As they came.
    pub fn plain(bytes: Bytes) -> Self {
        Self(Form::Plain(bytes))
    }

    /// As they came.
    pub fn bytes(&self) -> Bytes {
        match &self.0 {
            Form::Plain(bytes) => Bytes::clone(bytes),
            Form::Packed { packed, length, like } => {
                let unpacked = unpack(&mut Decompress::new(false), packed, *length, like);
                unpacked.expect("it was unpacked once before it was kept").into()
            }
        }
    }

    /// The bytes, if they are not packed.
    pub(super) fn unpacked(&self) -> Option<&Bytes> {
        match &self.0 {
            Form::Plain(bytes) => Some(bytes),
            Form::Packed { .. } => None,
        }
    }
}

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.bytes() == other.bytes()
    }
}

impl Eq for Kept {}

impl Packer {
    pub(super) fn new() -> Self {
        Self { deflate: Compress::new(Compression::fast(), false), inflate: Decompress::new(false) }
    }

    /// `None`: they stay as they are, as they would not become smaller, or would not come back.
    pub(super) fn pack(&mut self, bytes: &[u8], like: &Like) -> Option<Kept> {
        self.deflate.reset();
        self.deflate.set_dictionary(&like.0).ok()?;
        let mut out = Vec::with_capacity(bytes.len());
        let end = self.deflate.compress_vec(bytes, &mut out, FlushCompress::Finish).ok()?;
        let packed: Arc<[u8]> = out.into();
        self.inflate.reset(false);
        let back = unpack(&mut self.inflate, &packed, bytes.len(), like)?;
        let same = end == Status::StreamEnd && back == bytes;
        same.then(|| Kept(Form::Packed { packed, length: bytes.len(), like: like.clone() }))
    }
}

fn unpack(inflate: &mut Decompress, packed: &[u8], length: usize, like: &Like) -> Option<Vec<u8>> {
    inflate.set_dictionary(&like.0).ok()?;
    let mut out = Vec::with_capacity(length);
    let end = inflate.decompress_vec(packed, &mut out, FlushDecompress::Finish).ok()?;
    (end == Status::StreamEnd && out.len() == length).then_some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn resource(n: usize) -> Vec<u8> {
        let name = format!("outbound|80||svc-{n}.ns{}.svc.cluster.local", n % 20);
        format!("{name} eds {name}; istio-peer-exchange ROOTCA default {name} tlsMode istio {n}").into_bytes()
    }

    #[test]
    fn what_is_alike_becomes_small_and_comes_back() {
        let (mut packer, like) = (Packer::new(), Like::of(&resource(0)));
        for n in 1..100 {
            let kept = packer.pack(&resource(n), &like).expect("smaller");
            assert!(kept.unpacked().is_none() && kept.bytes() == resource(n));
            let Form::Packed { packed, length, .. } = &kept.0 else { panic!("packed") };
            assert!(packed.len() * 3 < *length, "{} of {length}", packed.len());
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost(bytes in proptest::collection::vec(any::<u8>(), 0..70_000), like in ".{0,40}", same: bool) {
            let like = Like::of(if same { &bytes } else { like.as_bytes() });
            if let Some(kept) = Packer::new().pack(&bytes, &like) {
                prop_assert_eq!(kept.bytes(), bytes);
            }
        }
    }
}
