//! `ObjectMeta`.

use std::collections::BTreeMap;

use serde::Deserialize;

/// Name and labels of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Name.
    pub name: String,
    /// Namespace; the loader fills in `default`.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// RFC 3339, empty when absent: older sorts first, absent before all.
    pub creation_timestamp: String,
    /// Objects that it belongs to.
    pub owner_references: Vec<Owner>,
}

/// `OwnerReference`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Owner {
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// The one that made it.
    pub controller: bool,
}
