//! The two mouths: the model from YAML beside the model from the recording, field by field.

use anyhow::{Result, anyhow};
use proxy_config::Loaded;

use super::input::Input;

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
