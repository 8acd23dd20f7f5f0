//! The chain: one cube takes one segment of one head and 64 or 128 value channels from chunk to chunk, with the transposed
//! state in registers, value channels × key channels.
//!
//! ```text
//! with time:      W = M (v − e^G ∘ K S)             o = scale e^G ∘ Q S + P W          S ← e^{G_last} S + (e^{G_last − G} ∘ K)ᵀ W
//! against time:   dv = Mᵀ (e^{G_last − G} ∘ K Z + Pᵀ do)      Z ← e^{G_last} Z + scale (e^G ∘ Q)ᵀ do − (e^G ∘ K)ᵀ dv
//! ```
//!
//! with `P_ij = scale e^{G_i − G_j} (q_i · k_j)` for `j ≤ i`, and M of [`super::prepare`].
//!
//! The warpgroups have roles:
//!
//! | role | what it does in a chunk |
//! |---|---|
//! | one or two that walk ([`super::walk`]) | what the next state waits for, 64 value channels each |
//! | one beside it, where there are queries ([`super::beside`]) | with time the outputs, behind the walk; against time `Pᵀ do`, ahead of it |
//! | the loader's | one warp starts the tensor memory copies, one sums the decays, one stores ([`super::store`]) |
//!
//! Rings of barriers stand between them. Every role takes the same steps, one a chunk, over all the segments that the cube
//! works on, and counts them from 0; a segment without tokens has none. An arrival is that of a warp whose units have met.
//!
//! | ring (stages) | filled by, arrivals | awaited by | released by, arrivals, when |
//! |---|---|---|---|
//! | `tiles` (2 to 4) | the copies 1, the decays' units 32 | walk, beside | walk 4 each, at the end of its step; beside 4, when it needs none of its chunk any more |
//! | `states` (2), with time | walk 4: the state before the chunk is written | beside | beside 4: `Q S` is there |
//! | `handed` (2), with time | walk 4: W is written | beside | beside 4: `P W` is there |
//! | `handed` (2), against time | beside 4: `Pᵀ do` is written | walk | walk 4: it has been read |
//! | `stores` (2), the outputs | beside 4: they are written | the storing warp | the same 1: the copies have read them |
//! | `stores` (2), states and values | walk 4 each, at the end of its step | the storing warp | the same 1, likewise |
//!
//! With time the walk waits for nothing of the one beside but room, which step n − 2 left, and the one beside never waits for
//! a later step of the walk; against time it is the other way round. The storing warp waits for what its own step wrote, and
//! others wait for it two steps later. So nobody waits in a circle, and nobody can be two phases ahead of who waits for it.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use half::bf16;

use super::beside;
use super::parts::Decays;
use super::place::{Place, chunk_at, place};
use super::plan::{
    CHUNK, ChainPlan, DECAYED, DECAYS, FACTORS, HELD, LEFT, OUT, PANEL, READ, SCORES, SLOTS, TOKENS, WRITTEN,
};
use super::{store, walk};
use crate::hopper_walk::parts::load_tile;
use crate::tile::hopper::{
    Ring, barrier_arrive, barrier_expect, barrier_fence, declare, declare_fragment, give_registers, take_registers,
    warpgroup,
};

/// Warps of a warpgroup.
const WARPS: usize = 4;

/// Words of so many panels; something is allocated for none, too.
fn words_of(panels: usize) -> usize {
    usize::max(panels * PANEL / 4, 32)
}

#[cube(launch_unchecked)]
pub(super) fn chain(
    q: &TensorMap<bf16, Tiled>,
    k: &TensorMap<bf16, Tiled>,
    v: &TensorMap<bf16, Tiled>,
    inverse: &TensorMap<bf16, Tiled>,
    o: &TensorMap<bf16, Tiled>,
    borders: &TensorMap<bf16, Tiled>,
    rows: &mut [u32],
    g: &[f32],
    table: &[i32],
    initial: &[f32],
    last: &mut [f32],
    heads: u32,
    groups: u32,
    items: u32,
    out_scale: f32,
    #[comptime] plan: ChainPlan,
) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let stages = comptime!(plan.stages);
    let queries = comptime!(plan.with_queries() as usize);
    let shared_q = Shared::<[u32]>::new_aligned_slice(comptime!(words_of(queries * stages * panels)), 1024usize);
    let shared_k = Shared::<[u32]>::new_aligned_slice(comptime!(stages * panels * PANEL / 4), 1024usize);
    let shared_v = Shared::<[u32]>::new_aligned_slice(comptime!(stages * warpgroups * PANEL / 4), 1024usize);
    let shared_m = Shared::<[u32]>::new_aligned_slice(comptime!(stages * PANEL / 4), 1024usize);
    let shared_s = Shared::<[u32]>::new_aligned_slice(comptime!(words_of(plan.state_panels())), 1024usize);
    let shared_x = Shared::<[u32]>::new_aligned_slice(comptime!(words_of(plan.handed_panels())), 1024usize);
    let shared_o = Shared::<[u32]>::new_aligned_slice(comptime!(words_of(plan.out_panels())), 1024usize);
    let mut shared_g = Shared::<[f32]>::new_aligned_slice(comptime!(stages * DECAYS), 128usize);
    let barriers = Shared::<[u64]>::new_slice(comptime!(2 * stages + 6 * SLOTS));
    let barrier = generic_to_shared::<u64>(barriers.as_ptr());
    let area = Area {
        q: generic_to_shared::<u32>(shared_q.as_ptr()),
        k: generic_to_shared::<u32>(shared_k.as_ptr()),
        v: generic_to_shared::<u32>(shared_v.as_ptr()),
        m: generic_to_shared::<u32>(shared_m.as_ptr()),
        s: generic_to_shared::<u32>(shared_s.as_ptr()),
        x: generic_to_shared::<u32>(shared_x.as_ptr()),
        o: generic_to_shared::<u32>(shared_o.as_ptr()),
        g: generic_to_shared::<f32>(shared_g.as_ptr()),
        tiles: Ring::new(barrier, comptime!(stages as u32)),
        states: Ring::new(barrier + comptime!(16 * stages as u32), comptime!(SLOTS as u32)),
        handed: Ring::new(barrier + comptime!(16 * (stages + SLOTS) as u32), comptime!(SLOTS as u32)),
        stores: Ring::new(barrier + comptime!(16 * (stages + 2 * SLOTS) as u32), comptime!(SLOTS as u32)),
    };
    declare(comptime!(plan.state()));
    declare(READ);
    declare(FACTORS);
    declare(LEFT);
    declare_fragment(comptime!(plan.operand()));
    declare_fragment(TOKENS);
    declare_fragment(DECAYED);
    declare_fragment(HELD);
    if comptime!(plan.with_queries()) {
        declare(SCORES);
        declare(OUT);
        declare(WRITTEN);
    }
    if UNIT_POS == 0 {
        // The copies' arrival, and that of each unit of the warp that sums decays.
        area.tiles.init(33u32, comptime!((WARPS * (warpgroups + queries)) as u32));
        area.states.init(comptime!(WARPS as u32), comptime!(WARPS as u32));
        area.handed.init(comptime!(WARPS as u32), comptime!(WARPS as u32));
        area.stores.init(comptime!((WARPS * warpgroups) as u32), 1u32);
        barrier_fence();
    }
    sync_cube();

    let work = items * heads * comptime!(plan.slices() as u32);
    let warpgroup = warpgroup();
    let warp = (UNIT_POS % 128u32) / 32u32;
    let lane = UNIT_POS % 32u32;
    if warpgroup == comptime!((warpgroups + queries) as u32) {
        give_registers(40u32);
        if warp == 0u32 {
            if lane == 0u32 {
                let maps = Maps {
                    q: tensor_map_address(q),
                    k: tensor_map_address(k),
                    v: tensor_map_address(v),
                    m: tensor_map_address(inverse),
                };
                load(&area, &maps, table, work, heads, groups, plan);
            }
        } else if warp == 1u32 {
            load_decays(&area, &mut shared_g, g, table, work, heads, lane, plan);
        } else if warp == 2u32 {
            if comptime!(plan.stores()) {
                let maps = (tensor_map_address(o), tensor_map_address(borders));
                store::run(&area, table, rows, maps, work, heads, lane, plan);
            }
        }
    } else if warpgroup == comptime!(warpgroups as u32) {
        // Without queries this is the loader's.
        if comptime!(plan.with_queries()) {
            take_registers(232u32);
            beside::run(&area, table, work, heads, out_scale, warp, lane, plan);
        }
    } else {
        take_registers(232u32);
        walk::run(&area, table, initial, last, work, heads, out_scale, warpgroup, warp, lane, plan);
    }
}

/// The addresses of a cube's tiles and barriers.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Area {
    q: u32,
    k: u32,
    v: u32,
    m: u32,
    s: u32,
    x: u32,
    o: u32,
    g: u32,
    pub(super) tiles: Ring,
    pub(super) states: Ring,
    pub(super) handed: Ring,
    pub(super) stores: Ring,
}

/// Where a warpgroup finds a chunk.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) q: u32,
    pub(super) k: u32,
    /// Values, or against time the gradient of the outputs.
    pub(super) v: u32,
    pub(super) m: u32,
    /// The state before the chunk, against time the gradient of that after it.
    pub(super) s: u32,
    /// What warpgroups hand to each other: W with time, `Pᵀ do` against time.
    pub(super) x: u32,
    /// What the chunk leaves in memory.
    pub(super) o: u32,
    /// The sums of decays, their exponentials, the decays to the chunk's end.
    pub(super) g: u32,
    pub(super) grown: u32,
    pub(super) left: u32,
}

#[cube]
impl Area {
    /// Those of a step, for a warpgroup that walks.
    pub(super) fn at(&self, step: u32, warpgroup: u32, #[comptime] plan: ChainPlan) -> Tiles {
        let wide = comptime!((plan.panels() * PANEL) as u32);
        let narrow = comptime!((plan.warpgroups * PANEL) as u32);
        let stage = self.tiles.stage(step);
        let slot = (step % comptime!(SLOTS as u32)) * comptime!(plan.warpgroups as u32) + warpgroup;
        let g = self.g + stage * comptime!(4 * DECAYS as u32);
        Tiles {
            q: self.q + stage * wide,
            k: self.k + stage * wide,
            v: self.v + stage * narrow + warpgroup * comptime!(PANEL as u32),
            m: self.m + stage * comptime!(PANEL as u32),
            s: self.s + slot * wide,
            x: self.x + slot * comptime!(PANEL as u32),
            o: self.o + slot * comptime!(PANEL as u32),
            g,
            grown: g + comptime!(4 * CHUNK as u32),
            left: g + comptime!(8 * CHUNK as u32),
        }
    }
}

/// A warp arrives at a barrier, once all of its units are here.
#[cube]
pub(super) fn arrive_warp(barrier: u32, lane: u32) {
    sync_plane();
    if lane == 0u32 {
        barrier_arrive(barrier);
    }
}

/// A warp releases a ring's stage, once all of its units are here.
#[cube]
pub(super) fn release_warp(ring: &Ring, step: u32, lane: u32) {
    sync_plane();
    if lane == 0u32 {
        ring.release(step);
    }
}

/// The maps of the tensors that are loaded.
#[derive(CubeType, Clone, Copy)]
struct Maps {
    q: u64,
    k: u64,
    v: u64,
    m: u64,
}

/// One unit starts the copies of each chunk.
#[cube]
fn load(area: &Area, maps: &Maps, table: &[i32], work: u32, heads: u32, groups: u32, #[comptime] plan: ChainPlan) {
    let warpgroups = comptime!(plan.warpgroups);
    let panels = comptime!(plan.panels());
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, comptime!(plan.slices()));
        let channel = p.slice * comptime!(64 * warpgroups as u32);
        let key_head = p.head / groups;
        for i in 0..p.chunks {
            let token = p.start + chunk_at(i, p.chunks, comptime!(plan.against_time())) * comptime!(CHUNK as u32);
            area.tiles.wait_room(step);
            let full = area.tiles.full(step);
            let t = area.at(step, 0u32, plan);
            barrier_expect(full, comptime!(plan.stage_bytes() as u32));
            load_tile(t.k, maps.k, 0u32, key_head, token, full, panels);
            if comptime!(plan.with_queries()) {
                load_tile(t.q, maps.q, 0u32, key_head, token, full, panels);
            }
            load_tile(t.v, maps.v, channel, p.head, token, full, warpgroups);
            load_tile(t.m, maps.m, 0u32, p.head, token, full, 1usize);
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}

/// The log decays of the chunk of step `i`: none after the last one.
#[cube]
fn decays_of_step(g: &[f32], p: &Place, i: u32, heads: u32, lane: u32, #[comptime] plan: ChainPlan) -> Decays {
    let first = chunk_at(i, p.chunks, comptime!(plan.against_time())) * comptime!(CHUNK as u32);
    let count = select(i < p.chunks, u32::min(p.length - first, comptime!(CHUNK as u32)), 0u32);
    Decays::of_tokens(g, p.start + first, count, p.head, heads, lane, comptime!(plan.gated))
}

/// One warp sums the decays of each chunk; those of the next one are on their way meanwhile.
#[cube]
fn load_decays(
    area: &Area,
    shared_g: &mut [f32],
    g: &[f32],
    table: &[i32],
    work: u32,
    heads: u32,
    lane: u32,
    #[comptime] plan: ChainPlan,
) {
    let mut step = 0u32;
    let mut index = CUBE_POS_X;
    while index < work {
        let p = place(index, table, heads, comptime!(plan.slices()));
        let begin = decays_of_step(g, &p, 0u32, heads, lane, plan);
        let mut low = begin.low + 0.0f32;
        let mut high = begin.high + 0.0f32;
        for i in 0..p.chunks {
            let first = chunk_at(i, p.chunks, comptime!(plan.against_time())) * comptime!(CHUNK as u32);
            let count = u32::min(p.length - first, comptime!(CHUNK as u32));
            let next = decays_of_step(g, &p, i + 1u32, heads, lane, plan);
            let sums = Decays { low: low + 0.0f32, high: high + 0.0f32 }.summed(comptime!(plan.gated));
            area.tiles.wait_room(step);
            let to = (area.tiles.stage(step) * comptime!(DECAYS as u32)) as usize;
            sums.write(shared_g, to, count, lane);
            barrier_arrive(area.tiles.full(step));
            low = next.low;
            high = next.high;
            step += 1u32;
        }
        index += CUBE_COUNT_X;
    }
}
