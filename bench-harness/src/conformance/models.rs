//! The two mouths: the model from YAML beside the model from the recording, field by field.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use flate2::read::GzDecoder;
use proxy_config::xds::{Decoded, XdsBundle, decode};
use proxy_config::{Loaded, diff};

use super::input::Input;
use super::rules::Rules;
use super::tally::Difference;

/// The model of a proxy from its YAML.
///
/// # Errors
/// When there is none; tells why.
pub(super) fn from_yaml(input: &Input) -> Result<Loaded> {
    let inputs = input.load()?;
    proxy_config::from_yaml(&inputs, None).map_err(|rejects| {
        let told: Vec<String> = rejects.iter().map(ToString::to_string).collect();
        anyhow!("{}", told.join("; "))
    })
}

/// Every field in which the two models differ, and every field that nobody read and no rule calls inert.
pub(super) fn compare(rules: &Rules, input: &Input, recording: &Path) -> Vec<Difference> {
    let both = from_yaml(input).and_then(|loaded| Ok((loaded, from_recording(recording)?)));
    let (loaded, decoded) = match both {
        Ok(both) => both,
        Err(error) => return vec![Difference::new("load", "two models", format!("{error:#}"))],
    };
    let differs = diff::diff(&loaded.model, &decoded.model);
    // Names were recorded only where the proxy asked for them.
    let asked = !decoded.model.names.is_empty();
    let mut out: Vec<Difference> = differs
        .into_iter()
        .filter(|d| asked || !d.path.starts_with("names["))
        .map(|d| Difference::new(format!("model.{}", d.path), d.xds, d.yaml))
        .collect();
    for (side, unread) in [("recorded", &decoded.unread), ("YAML", &loaded.unread)] {
        for path in unread.iter().filter(|path| !rules.is_inert(path)) {
            out.push(Difference::new(format!("unread.{side}.{path}"), "read, or listed as inert", "unread"));
        }
    }
    out
}

fn from_recording(folder: &Path) -> Result<Decoded> {
    let mut responses = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| entry.ok().map(|e| e.path())).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = || fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
        if name.ends_with(".pb") {
            responses.push(bytes()?.into());
        } else if name.ends_with(".pb.gz") {
            let mut plain = Vec::new();
            GzDecoder::new(bytes()?.as_slice()).read_to_end(&mut plain)?;
            responses.push(plain.into());
        }
    }
    Ok(decode(&XdsBundle { responses }))
}
