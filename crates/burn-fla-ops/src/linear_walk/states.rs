//! The small kernels between the walks: the total decay of each chunk, and the scan that passes states over chunks.

use cubecl::prelude::*;

use super::plan::DecayKind;
use super::table::{CHUNK_WORDS, SEQUENCE_WORDS};

/// The sum of log decays of each chunk, `[chunks, H]`, `[chunks, H, K]` or `[chunks, H, V]`: one unit an element.
#[cube(launch, address_type = "dynamic")]
pub(super) fn totals(
    g: &[f32],
    table: &[i32],
    out: &mut [f32],
    heads: usize,
    count: usize,
    #[comptime] kind: DecayKind,
    #[comptime] channels: usize,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let channel = ABSOLUTE_POS % channels;
    let head = (ABSOLUTE_POS / channels) % heads;
    let chunk = ABSOLUTE_POS / channels / heads;
    let start = table[chunk * comptime!(CHUNK_WORDS) + 1] as usize;
    let len = table[chunk * comptime!(CHUNK_WORDS) + 2] as usize;
    let mut sum = f32::new(0.0);
    if comptime!(kind == DecayKind::Head) {
        sum = f32::cast_from(len) * g[head];
    } else {
        for t in 0..len {
            sum += g[((start + t) * heads + head) * channels + channel];
        }
    }
    out[ABSOLUTE_POS] = sum;
}

/// Turns contributions into states: `S_{m+1} = e^{total_m} ∘ S_m + local_m` with time, the mirror image against it.
///
/// One unit an element of the state. `states` holds the contributions and receives the states, one slot more a sequence
/// than it has chunks; `first` is the state at the end that the scan starts from, `last` receives the one it arrives at.
#[cube(launch, address_type = "dynamic")]
pub(super) fn pass_states(
    states: &mut [f32],
    totals: &[f32],
    first: &[f32],
    table: &[i32],
    last: &mut [f32],
    heads: usize,
    chunks: usize,
    count: usize,
    #[comptime] keys: usize,
    #[comptime] values: usize,
    #[comptime] kind: DecayKind,
    #[comptime] channels: usize,
    #[comptime] against_time: bool,
) {
    if ABSOLUTE_POS >= count {
        terminate!();
    }
    let size = comptime!(keys * values);
    let element = ABSOLUTE_POS % size;
    let head = (ABSOLUTE_POS / size) % heads;
    let sequence = ABSOLUTE_POS / size / heads;
    let channel = if comptime!(kind == DecayKind::Key) {
        element / values
    } else if comptime!(kind == DecayKind::Value) {
        element % values
    } else {
        0usize.runtime()
    };
    let at = chunks * comptime!(CHUNK_WORDS) + sequence * comptime!(SEQUENCE_WORDS);
    let first_chunk = table[at] as usize;
    let chunk_count = table[at + 1] as usize;

    let mut state = first[ABSOLUTE_POS];
    let entry = first_chunk + sequence + if comptime!(against_time) { chunk_count } else { 0usize.runtime() };
    states[(entry * heads + head) * size + element] = state;
    for i in 0..chunk_count {
        let chunk = first_chunk + if comptime!(against_time) { chunk_count - 1 - i } else { i };
        let slot = chunk + sequence + comptime!(if against_time { 0usize } else { 1 });
        let here = (slot * heads + head) * size + element;
        let decay = f32::exp(totals[(chunk * heads + head) * channels + channel]);
        state = decay * state + states[here];
        states[here] = state;
    }
    last[ABSOLUTE_POS] = state;
}
