//! How the architectures say their feed-forward networks in config.json.

use super::fields::Fields;
use super::registry::{DEFAULTS, Defaults};
use crate::NnError;
use crate::layers::inner_size;
use crate::modules::{FeedForwardConfig, MlpActivation};

/// SwiGLU of `intermediate_size` features, or of 2/3 · `hidden_ratio` times the width, rounded up to a multiple of 256.
pub(super) fn gated(
    fields: &Fields<'_>,
    defaults: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    let intermediate_size = match fields.optional_usize("intermediate_size")? {
        Some(size) => size,
        None => size_of_ratio(fields, defaults, hidden_size)?,
    };
    gated_of(fields, intermediate_size)
}

fn gated_of(fields: &Fields<'_>, intermediate_size: usize) -> Result<Option<FeedForwardConfig>, NnError> {
    let activation = fields.optional_str("hidden_act")?.and_then(MlpActivation::from_name).unwrap_or_default();
    Ok(Some(FeedForwardConfig::Gated { intermediate_size, activation }))
}

fn size_of_ratio(fields: &Fields<'_>, defaults: &Defaults, hidden_size: usize) -> Result<usize, NnError> {
    let size = (hidden_size as f64 * hidden_ratio(fields, defaults)? * 2.0 / 3.0) as usize;
    Ok(256 * size.max(1).div_ceil(256))
}

/// SwiGLU whose size follows from `hidden_ratio` alone: `intermediate_size` is that of the mixers.
pub(super) fn gated_beside_inner_channels(
    fields: &Fields<'_>,
    defaults: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    none_but_inner_channels(fields, defaults, hidden_size)?;
    gated_of(fields, size_of_ratio(fields, defaults, hidden_size)?)
}

/// No feed-forward network; `intermediate_size` counts the inner channels of the mixers, which `expand` decides.
pub(super) fn none_but_inner_channels(
    fields: &Fields<'_>,
    _: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    let inner = inner_size(fields, hidden_size)?;
    match fields.optional_usize("intermediate_size")? {
        Some(size) if size != inner => {
            let message = format!("is {size}, and expand times hidden_size is {inner}; change expand, or leave it out");
            Err(fields.error("intermediate_size", message))
        }
        _ => Ok(None),
    }
}

pub(super) fn rwkv6_channel_mix(
    fields: &Fields<'_>,
    _: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    let intermediate_size = channel_mix_size(fields, 3.5, hidden_size)?;
    Ok(Some(FeedForwardConfig::Rwkv6 { intermediate_size }))
}

pub(super) fn rwkv7_channel_mix(
    fields: &Fields<'_>,
    _: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    let intermediate_size = channel_mix_size(fields, 4.0, hidden_size)?;
    Ok(Some(FeedForwardConfig::Rwkv7 { intermediate_size, layer: [0, 1] }))
}

/// `intermediate_size`, or `hidden_ratio` (null: `ratio`) times the width, rounded up to a multiple of 32.
fn channel_mix_size(fields: &Fields<'_>, ratio: f64, hidden_size: usize) -> Result<usize, NnError> {
    if let Some(size) = fields.optional_usize("intermediate_size")? {
        return Ok(size);
    }
    let ratio = match fields.get("hidden_ratio") {
        Some(_) => hidden_ratio(fields, &DEFAULTS)?,
        None => ratio,
    };
    let size = (hidden_size as f64 * ratio) as usize;
    Ok(32 * size.max(1).div_ceil(32))
}

/// No feed-forward network; `num_heads` has to agree with the width of the heads.
pub(super) fn none_but_heads(
    fields: &Fields<'_>,
    defaults: &Defaults,
    hidden_size: usize,
) -> Result<Option<FeedForwardConfig>, NnError> {
    let (inner, width) = (inner_size(fields, hidden_size)?, fields.usize("head_dim", 64)?);
    match fields.optional_usize("num_heads")? {
        Some(heads) if heads * width != inner => {
            let message =
                format!("{heads} heads of head_dim {width} are not the {inner} channels of expand times hidden_size");
            Err(fields.error("num_heads", message))
        }
        _ => none_but_inner_channels(fields, defaults, hidden_size),
    }
}

/// The field `hidden_ratio`; null means 4.
fn hidden_ratio(fields: &Fields<'_>, defaults: &Defaults) -> Result<f64, NnError> {
    match fields.optional_f64("hidden_ratio")? {
        Some(ratio) if ratio > 0.0 && ratio <= 1024.0 => Ok(ratio),
        Some(_) => Err(fields.error("hidden_ratio", "must be above 0")),
        None if fields.is_null("hidden_ratio") => Ok(4.0),
        None => Ok(defaults.hidden_ratio),
    }
}
