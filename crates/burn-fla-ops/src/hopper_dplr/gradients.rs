//! The gradients of all but the values: all chunks at once, from the states at their borders.
//!
//! With S the state before a chunk and Z the gradient of that after it, the gradients of its operands (see [`super`]) are
//!
//! ```text
//! dQ′ = do Sᵀ      dK′ = V Zᵀ      dP = do Vᵀ      dÃ = (B̂ Z) Sᵀ      dB̂ = (Ã S) Zᵀ      de^{G_C} = diag(S Zᵀ)
//! ```
//!
//! and from there on all is between key channels:
//!
//! ```text
//! dA_qb = dQ′ Ãᵀ + dP Hᵀ       dÃ += A_qbᵀ dQ′       dH = A_qbᵀ dP + B̂ dK′ᵀ       dB̂ += H dK′       dA_qk = dP
//! dã = Nᵀ dÃ                   dA_ak = Nᵀ dH         dA_ab = dã Ãᵀ + dA_ak Hᵀ
//! dq_i = e^{G_i} ∘ dQ′_i + Σ_j e^{G_i − G_j} ∘ (dA_qb b_j + dA_qk k_j)          da alike, with dã and G_{i−1}
//! dk_j = e^{G_C − G_j} ∘ dK′_j + Σ_i (dA_qk e^{G_i − G_j} ∘ q_i + dA_ak e^{G_{i−1} − G_j} ∘ a_i)          db alike, with dB̂
//! dg_t = e^{G_C} de^{G_C} + Σ_{i ≥ t} (q_i dq_i − k_i dk′_i − b_i db′_i) + Σ_{i > t} a_i da_i + Σ_{j < t} inter_j
//! ```
//!
//! where in dg `dk′` and `db′` come without their first terms, whose products with k and b are inter. So no two large numbers
//! cancel, and products of two tokens are made of the same rounded numbers in both of their places.
//!
//! One cube of eight warps has a chunk, on Hopper too: its products are of single warps. The first four compute what reads,
//! dQ′ and dÃ, later dq and da; the others what writes, dK′ and dB̂, later dk and db. The tokens' vectors are brought when Ã, B̂,
//! N and H are needed no more, and take their places, so that head sizes up to 64 fit into 99 KiB. Units have 250 registers and
//! more, so that one cube has a processor's register file to itself.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::exact::exact_gradients;
use super::finish::{Sums, finish_panel, store_strengths};
use super::gradient_parts::{
    ACC, OUTER, Room, add_pairs, answers, end_products, inter_products, keep_rows, outer_products, park, publish_outer,
    solve, solve_again, store_tokens, take_back,
};
use super::parts::scale_by;
use super::plan::{CHUNK, Form, GradientPlan, PANEL, READ, TEAM, TOKENS};
use super::products::declare_operands;
use super::tokens::{BATCH, Part, centre_decays, load_strengths, part_of, sum_decays, two_of};
use crate::hopper_walk::Cores;
use crate::hopper_walk::parts::publish;
use crate::mma_walk::loads::load_tile;
use crate::tile::mma::{address_of, commit_copies, declare, declare_fragment, exp2, row_of, wait_copies};

/// Tokens a warp.
pub(crate) const TOKENS_OF_WARP: usize = BATCH;

#[cube(launch_unchecked)]
pub(super) fn gradients(
    first: &[u32],
    second: &[u32],
    inverse: &[u32],
    scores: &[u32],
    passed: &[u32],
    values: &[u32],
    grad_o: &[u32],
    states: &[u32],
    grad_states: &[u32],
    q: &[u32],
    k: &[u32],
    a: &[u32],
    b: &[u32],
    gates: &[u32],
    strengths: &[f32],
    table: &[i32],
    dq: &mut [u32],
    dk: &mut [u32],
    da: &mut [u32],
    db: &mut [u32],
    dg: &mut [u32],
    dbeta: &mut [f32],
    heads: u32,
    groups: u32,
    state_rows: u32,
    grad_rows: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let key = comptime!(plan.key);
    let panels = comptime!(plan.key.panels());
    let padded = comptime!(plan.key.padded() as u32);
    let wide = comptime!((plan.key.panels() * PANEL) as u32);
    let one = comptime!(PANEL as u32);
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let tiles = Shared::<[u32]>::new_aligned_slice(comptime!(plan.tile_bytes() / 4), 1024usize);
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(plan.team_sums()), 128usize);
    let parked = Shared::<[f32]>::new_aligned_slice(comptime!(2 * plan.parked()), 1024usize);
    declare(outer);
    declare(inner);
    if comptime!(!plan.parks) {
        declare(comptime!(plan.inter()));
    }
    declare(READ);
    declare(OUTER);
    declare(ACC);
    declare_fragment(TOKENS);
    declare_fragment(comptime!(plan.operand()));
    declare_operands(Cores::Mma);
    let unit = UNIT_POS;
    // The same for all units of a warp, and seen to be.
    let reads = plane_broadcast(unit / 128u32, 0u32) == 0u32;
    let warp = (unit % 128u32) / 32u32;
    let lane = unit % 32u32;
    let row = row_of(warp, lane, 0usize);
    let id = u32::new(1);
    let q0 = generic_to_shared::<u32>(tiles.as_ptr());
    let n0 = q0 + 2u32 * wide;
    let qb0 = q0 + comptime!(plan.second_part());
    let z0 = qb0 + 3u32 * one;
    let parked0 = generic_to_shared::<f32>(parked.as_ptr());
    let t = Room {
        q: q0,
        k: q0 + wide,
        a: q0 + 2u32 * wide,
        b: q0 + 3u32 * wide,
        first: q0,
        second: q0 + wide,
        n: n0,
        h: n0 + one,
        qb: qb0,
        v: qb0 + one,
        o: qb0 + 2u32 * one,
        z: z0,
        s: z0 + wide,
        logs: z0 + one,
        stage: qb0,
        parked: parked0,
        inter: parked0 + comptime!(4 * plan.parked() as u32),
    };
    let at = Sums::of(plan);
    let part = part_of(CUBE_POS_X, table, table_at, heads, groups, unit, TOKENS_OF_WARP);
    let block = part.block * comptime!(CHUNK as u32);
    let rows = comptime!(CHUNK as u32);
    let units = comptime!(TEAM);
    let channels = comptime!(plan.key.padded());
    load_tile(t.first, address_of(first), 0u32, block, 0u32, 1u32, rows, channels, panels, units);
    load_tile(t.second, address_of(second), 0u32, block, 0u32, 1u32, rows, channels, panels, units);
    load_slice(&t, &part, 0u32, values, grad_o, states, grad_states, heads, state_rows, grad_rows, plan);
    load_tile(t.qb, address_of(scores), 0u32, block, 0u32, 1u32, rows, CHUNK, 1usize, units);
    load_tile(t.h, address_of(passed), 0u32, block, 0u32, 1u32, rows, CHUNK, 1usize, units);
    load_tile(t.n, address_of(inverse), 0u32, block, 0u32, 1u32, rows, CHUNK, 1usize, units);
    commit_copies();
    let mut logs = Array::<f32>::new(comptime!(2 * TOKENS_OF_WARP * panels));
    let mut middles = Array::<f32>::new(comptime!(2 * panels));
    let mut befores = Array::<f32>::new(comptime!(2 * panels));
    sum_decays(&part, gates, heads, &mut sums, at.decays, &mut logs, TOKENS_OF_WARP, key);
    sync_cube();
    let fast = centre_decays(&part, &sums, at.decays, &mut logs, &mut middles, &mut befores, TOKENS_OF_WARP, key);
    let mut strength = Array::<f32>::new(BATCH);
    load_strengths(&part, strengths, heads, &mut strength, 0usize, key);
    // The products of both states, by key channel.
    let mut ends = Array::<f32>::new(comptime!(2 * panels));
    #[unroll]
    for panel in 0..panels {
        let middle = two_of(&middles, panel);
        if part.warp == 0u32 {
            let to = part.channel(panel) as usize;
            sums[at.factors + to] = select(fast, exp2(middle.low), 1.0f32);
            sums[at.factors + to + 1] = select(fast, exp2(middle.high), 1.0f32);
            sums[at.middles + to] = middle.low;
            sums[at.middles + to + 1] = middle.high;
        }
        ends[comptime!(2 * panel)] = f32::new(0.0);
        ends[comptime!(2 * panel + 1)] = f32::new(0.0);
    }
    if comptime!(plan.parks) {
        park(t.parked, &logs, unit, panels);
    }
    for slice in 0..comptime!(plan.slices() as u32) {
        if slice > 0u32 {
            sync_cube();
            load_slice(&t, &part, slice, values, grad_o, states, grad_states, heads, state_rows, grad_rows, plan);
            commit_copies();
        }
        wait_copies(0u32);
        sync_cube();
        outer_products(&t, slice, reads, warp, lane, plan);
        end_products(&t, &part, &mut ends, plan);
    }
    #[unroll]
    for panel in 0..panels {
        let to = at.ends + (part.warp * padded + part.channel(panel)) as usize;
        sums[to] = ends[comptime!(2 * panel)];
        sums[to + 1] = ends[comptime!(2 * panel + 1)];
    }
    // Nobody reads the slice any more; what was computed of it stands in its place.
    sync_cube();
    keep_rows(outer, row, part.length);
    publish(if reads { t.s } else { t.z }, outer, row, lane);
    publish_outer(t.v, reads, row, lane, part.length);
    sync_cube();
    answers(&t, reads, warp, lane, plan);
    sync_cube();
    solve(&t, reads, row, warp, lane, id, plan);
    sync_cube();
    if reads {
        solve_again(&t, row, warp, lane, plan);
    }
    // Ã, B̂, N and H have been read.
    sync_cube();
    if comptime!(plan.parks) {
        take_back(t.parked, &mut logs, unit, panels);
    }
    #[unroll]
    for panel in 0..panels {
        store_tokens(&t, &part, q, k, a, b, &logs, &befores, &strength, fast, out_scale, panel, key);
    }
    sync_cube();
    if fast {
        scale_by(outer, &sums, at.factors, lane);
        scale_by(inner, &sums, at.factors, lane);
        if !reads {
            inter_products(&t, row, lane, plan);
        }
        add_pairs(&t, reads, warp, lane, plan);
    } else {
        exact_gradients(&t, &part, &logs, &sums, at.middles, reads, row, lane, id, plan);
    }
    // No product reads what is written over now.
    sync_cube();
    let mut of_strength = Array::<f32>::new(BATCH);
    #[unroll]
    for panel in 0..panels {
        finish_panel(
            &t,
            &part,
            &mut sums,
            &at,
            &logs,
            &befores,
            &middles,
            &strength,
            &mut of_strength,
            a,
            b,
            dq,
            dk,
            da,
            db,
            dg,
            fast,
            reads,
            row,
            lane,
            id,
            heads,
            out_scale,
            panel,
            plan,
        );
    }
    if comptime!(key.form == Form::Key) {
        store_strengths(&part, &of_strength, dbeta, heads);
    }
}

/// Starts loading a slice of 64 value channels: values, the outputs' gradients, and both states.
#[cube]
fn load_slice(
    t: &Room,
    part: &Part,
    slice: u32,
    values: &[u32],
    grad_o: &[u32],
    states: &[u32],
    grad_states: &[u32],
    heads: u32,
    state_rows: u32,
    grad_rows: u32,
    #[comptime] plan: GradientPlan,
) {
    let panels = comptime!(plan.key.panels());
    let padded = comptime!(plan.key.padded());
    let width = comptime!(plan.values);
    let channel = slice * 64u32;
    let (start, head, length) = (part.start, part.head, part.length);
    load_tile(t.v, address_of(values), channel, start, head, heads, length, width, 1usize, TEAM);
    load_tile(t.o, address_of(grad_o), channel, start, head, heads, length, width, 1usize, TEAM);
    let state = part.block * state_rows + channel;
    load_tile(t.s, address_of(states), 0u32, state, 0u32, 1u32, 64u32, padded, panels, TEAM);
    let state = part.block * grad_rows + channel;
    load_tile(t.z, address_of(grad_states), 0u32, state, 0u32, 1u32, 64u32, padded, panels, TEAM);
}
