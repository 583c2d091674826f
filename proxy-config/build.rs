//! Embeds the message descriptors that `envoy-types` ships, without comments and packed: `/config_dump` names fields with
//! them. They are data of that crate, found where cargo unpacked it; without them the dump shows bytes and says so.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use prost::Message;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.gz");
    let packed = match descriptors() {
        Ok(set) => pack(&set)?,
        Err(e) => {
            println!("cargo::warning=no message descriptors, /config_dump will show bytes: {e}");
            Vec::new()
        }
    };
    std::fs::write(out, packed)?;
    Ok(())
}

fn descriptors() -> Result<FileDescriptorSet, Box<dyn Error>> {
    let file = manifest("envoy-types")?.join("src/generated/types.bin");
    let bytes = std::fs::read(&file).map_err(|e| format!("{}: {e}", file.display()))?;
    let mut set = FileDescriptorSet::decode(&*bytes)?;
    for file in &mut set.file {
        file.source_code_info = None;
        file.service.clear();
    }
    Ok(set)
}

/// The folder of a dependency.
fn manifest(package: &str) -> Result<PathBuf, Box<dyn Error>> {
    let cargo = std::env::var("CARGO")?;
    let here = std::env::var("CARGO_MANIFEST_DIR")?;
    let output =
        Command::new(cargo).args(["metadata", "--offline", "--format-version", "1"]).current_dir(here).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    let found = packages.iter().find(|p| p["name"] == package).and_then(|p| p["manifest_path"].as_str());
    let manifest = Path::new(found.ok_or("not among the packages")?);
    Ok(manifest.parent().ok_or("a manifest without a folder")?.to_owned())
}

fn pack(set: &FileDescriptorSet) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packer.write_all(&set.encode_to_vec())?;
    Ok(packer.finish()?)
}
