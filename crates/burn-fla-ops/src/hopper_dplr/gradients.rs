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
//! A team of two warpgroups has a chunk. The first one computes what reads, dQ′ and dÃ, later dq and da; the second what
//! writes, dK′ and dB̂, later dk and db. Where one panel holds the key channels two teams share a cube.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::chain::load_block;
use super::exact::exact_gradients;
use super::finish::{Sums, finish_panel, store_strengths};
use super::gradient_parts::{
    ACC, OUTER, Room, add_pairs, answers, end_products, inter_products, keep_rows, load_slice, outer_products,
    publish_outer, solve, solve_again, store_tokens,
};
use super::parts::scale_by;
use super::plan::{Form, GradientPlan, PANEL, READ, TEAM, TOKENS};
use super::tokens::{BATCH, centre_decays, load_strengths, part_of, sum_decays, two_of};
use crate::hopper_walk::parts::publish;
use crate::tile::hopper::{
    barrier_expect, barrier_fence, barrier_init, barrier_wait, declare, declare_fragment, exp2, fence_shared, row_of,
    sync_warpgroup,
};

/// Tokens a warp.
pub(crate) const TOKENS_OF_WARP: usize = BATCH;

#[cube(launch_unchecked)]
pub(crate) fn gradients(
    first: &TensorMap<bf16, Tiled>,
    second: &TensorMap<bf16, Tiled>,
    inverse: &TensorMap<bf16, Tiled>,
    scores: &TensorMap<bf16, Tiled>,
    passed: &TensorMap<bf16, Tiled>,
    values: &TensorMap<bf16, Tiled>,
    grad_o: &TensorMap<bf16, Tiled>,
    states: &TensorMap<bf16, Tiled>,
    grad_states: &TensorMap<bf16, Tiled>,
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
    blocks: u32,
    table_at: u32,
    out_scale: f32,
    #[comptime] plan: GradientPlan,
) {
    let key = comptime!(plan.key);
    let panels = comptime!(plan.key.panels());
    let padded = comptime!(plan.key.padded() as u32);
    let teams = comptime!(plan.teams());
    let wide = comptime!((plan.key.panels() * PANEL) as u32);
    let one = comptime!(PANEL as u32);
    let outer = comptime!(plan.outer());
    let inner = comptime!(plan.inner());
    let shared = Shared::<[u32]>::new_aligned_slice(comptime!(teams * plan.team_panels() * PANEL / 4), 1024usize);
    // Sums of warps by key channel: of decays, later of the decay's gradient; of the products of states; of inter.
    let mut sums = Shared::<[f32]>::new_aligned_slice(comptime!(teams * plan.team_sums()), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(teams));
    declare(outer);
    declare(inner);
    declare(comptime!(plan.inter()));
    declare(READ);
    declare(OUTER);
    declare(ACC);
    declare_fragment(TOKENS);
    declare_fragment(comptime!(plan.operand()));
    let team = UNIT_POS / comptime!(TEAM as u32);
    let unit = UNIT_POS % comptime!(TEAM as u32);
    // The same for all units of a warp, and seen to be.
    let reads = plane_broadcast(unit / 128u32, 0u32) == 0u32;
    let warp = (unit % 128u32) / 32u32;
    let lane = unit % 32u32;
    let row = row_of(warp, lane, 0usize);
    let id = team + 1u32;
    let barrier = generic_to_shared::<u64>(barriers.as_ptr()) + team * 8u32;
    if unit == 0u32 {
        barrier_init(barrier, 1u32);
        barrier_fence();
    }
    sync_cube();
    let q0 = generic_to_shared::<u32>(shared.as_ptr()) + team * comptime!((plan.team_panels() * PANEL) as u32);
    let k0 = q0 + wide;
    let a0 = k0 + wide;
    let b0 = a0 + wide;
    let first0 = b0 + wide;
    let second0 = first0 + wide;
    let n0 = second0 + wide;
    let qb0 = n0 + one;
    let h0 = qb0 + one;
    let v0 = h0 + one;
    let o0 = v0 + one;
    let s0 = o0 + one;
    let z0 = s0 + wide;
    let t = Room {
        q: q0,
        k: k0,
        a: a0,
        b: b0,
        first: first0,
        second: second0,
        n: n0,
        qb: qb0,
        h: h0,
        v: v0,
        o: o0,
        s: s0,
        z: z0,
        logs: first0,
        stage: first0,
    };
    let at = Sums::of(team, plan);
    let mut turn = 0u32;
    let mut index = CUBE_POS_X * comptime!(teams as u32) + team;
    while index < blocks {
        let part = part_of(index, table, table_at, heads, groups, unit, TOKENS_OF_WARP);
        if unit == 0u32 {
            barrier_expect(barrier, comptime!(((2 * panels + 3 + plan.slice_panels()) * PANEL) as u32));
            load_block(first0, tensor_map_address(first), index, barrier, panels);
            load_block(second0, tensor_map_address(second), index, barrier, panels);
            load_slice(
                &t,
                &part,
                0u32,
                tensor_map_address(values),
                tensor_map_address(grad_o),
                tensor_map_address(states),
                tensor_map_address(grad_states),
                barrier,
                plan,
            );
            load_block(qb0, tensor_map_address(scores), index, barrier, 1usize);
            load_block(h0, tensor_map_address(passed), index, barrier, 1usize);
            load_block(n0, tensor_map_address(inverse), index, barrier, 1usize);
        }
        let mut logs = Array::<f32>::new(comptime!(2 * TOKENS_OF_WARP * panels));
        let mut middles = Array::<f32>::new(comptime!(2 * panels));
        let mut befores = Array::<f32>::new(comptime!(2 * panels));
        sum_decays(&part, gates, heads, &mut sums, at.decays, &mut logs, TOKENS_OF_WARP, key);
        sync_warpgroup(id, comptime!(TEAM as u32));
        let fast = centre_decays(&part, &sums, at.decays, &mut logs, &mut middles, &mut befores, TOKENS_OF_WARP, key);
        let mut strength = Array::<f32>::new(BATCH);
        load_strengths(&part, strengths, heads, &mut strength, 0usize, key);
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
            store_tokens(&t, &part, q, k, a, b, &logs, &befores, &strength, fast, out_scale, panel, key);
        }
        // The products of both states, by key channel.
        let mut ends = Array::<f32>::new(comptime!(2 * panels));
        #[unroll]
        for n in 0..comptime!(2 * panels) {
            ends[n] = f32::new(0.0);
        }
        for slice in 0..comptime!(plan.slices() as u32) {
            if slice > 0u32 {
                sync_warpgroup(id, comptime!(TEAM as u32));
                if unit == 0u32 {
                    barrier_expect(barrier, comptime!((plan.slice_panels() * PANEL) as u32));
                    load_slice(
                        &t,
                        &part,
                        slice,
                        tensor_map_address(values),
                        tensor_map_address(grad_o),
                        tensor_map_address(states),
                        tensor_map_address(grad_states),
                        barrier,
                        plan,
                    );
                }
            }
            barrier_wait(barrier, turn & 1u32);
            turn += 1u32;
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
        sync_warpgroup(id, comptime!(TEAM as u32));
        keep_rows(outer, row, part.length);
        publish(if reads { s0 } else { z0 }, outer, row, lane);
        publish_outer(v0, reads, row, lane, part.length);
        fence_shared();
        sync_warpgroup(id, comptime!(TEAM as u32));
        answers(&t, reads, warp, lane, plan);
        sync_warpgroup(id, comptime!(TEAM as u32));
        solve(&t, reads, row, warp, lane, id, plan);
        sync_warpgroup(id, comptime!(TEAM as u32));
        if reads {
            solve_again(&t, row, warp, lane, plan);
        } else if fast {
            scale_by(outer, &sums, at.factors, lane);
            scale_by(inner, &sums, at.factors, lane);
            inter_products(&t, row, lane, plan);
        }
        fence_shared();
        sync_warpgroup(id, comptime!(TEAM as u32));
        if fast {
            if reads {
                scale_by(outer, &sums, at.factors, lane);
                scale_by(inner, &sums, at.factors, lane);
            }
            add_pairs(&t, reads, warp, lane, plan);
        } else {
            exact_gradients(&t, &part, &logs, &sums, at.middles, reads, row, lane, id, plan);
        }
        // No product reads what is written over now.
        sync_warpgroup(id, comptime!(TEAM as u32));
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
        // Copies write where units wrote and read.
        fence_shared();
        sync_warpgroup(id, comptime!(TEAM as u32));
        index += CUBE_COUNT_X * comptime!(teams as u32);
    }
}
