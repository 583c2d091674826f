//! Messages of both protocols through one pair of types.

use bytes::{Buf, Bytes};
use prost::Message;
use proxy_config::xds::DiscoveryResponse;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use super::messages::{DeltaDiscoveryResponse, Request, Response};

/// Which protocol is spoken.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdsCodec {
    pub(super) delta: bool,
}

impl Codec for AdsCodec {
    type Encode = Request;
    type Decode = Response;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for AdsCodec {
    type Item = Request;
    type Error = Status;

    fn encode(&mut self, request: Request, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        let written = match request {
            Request::Delta(request) => request.encode(buffer),
            Request::Sotw(request) => request.encode(buffer),
        };
        written.map_err(|e| Status::internal(e.to_string()))
    }
}

impl Decoder for AdsCodec {
    type Item = Response;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Response>, Status> {
        // One buffer, which the resources share.
        let bytes: Bytes = buffer.copy_to_bytes(buffer.remaining());
        let read = if self.delta {
            DeltaDiscoveryResponse::decode(bytes).map(Response::Delta)
        } else {
            DiscoveryResponse::decode(bytes).map(Response::Sotw)
        };
        read.map(Some).map_err(|e| Status::internal(format!("malformed response: {e}")))
    }
}
