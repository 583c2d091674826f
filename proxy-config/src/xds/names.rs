//! NDS: the mesh's name table.

use std::collections::BTreeMap;
use std::mem::take;

use super::context::{Read, Reader};
use super::messages::{NameEntry, NameTable};
use crate::model::{Name, NameInfo};

/// `istio.networking.nds.v1.NameTable`.
pub(super) fn table(mut table: NameTable, reader: &mut Reader) -> Read<BTreeMap<Name, NameInfo>> {
    let out = take(&mut table.table).into_iter().map(|(host, entry)| (Name::from(host), info(entry))).collect();
    reader.done(&table);
    Ok(out)
}

fn info(entry: NameEntry) -> NameInfo {
    let NameEntry { ips, registry, shortname, namespace } = entry;
    NameInfo { ips, registry, shortname, namespace }
}
