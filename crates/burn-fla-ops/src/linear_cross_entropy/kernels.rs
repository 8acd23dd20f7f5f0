//! The kernels over rows of logits, and the product of a gradient with a number.

use cubecl::prelude::*;

use crate::rows::UNITS;

/// Below every logit, and finite: not every device has infinities.
const LOWEST: f32 = -1e30;

/// The loss of each row, and with `gradient` the row's `softmax − onehot` in the place of its logits. A cube works on
/// one row at a time; each unit keeps the largest of its logits and the sum of exponentials below it.
#[cube(launch, address_type = "dynamic")]
pub(super) fn rows<E: Float, N: Size>(
    logits: &mut Tensor<Vector<E, N>>,
    labels: &Tensor<i32>,
    count: &Tensor<f32>,
    losses: &mut Tensor<f32>,
    first: u32,
    rows: u32,
    ignored: i32,
    l2_warp: f32,
    #[comptime] width: usize,
    #[comptime] vector: usize,
    #[comptime] gradient: bool,
    #[comptime] warp: bool,
    #[define(E)] _element: ElemType,
) {
    let mut tops = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let mut places = Shared::<[u32]>::new_slice(comptime!(if warp { UNITS } else { 1 }));
    let unit = UNIT_POS as usize;
    let mut row = CUBE_POS_X as usize;
    while row < rows as usize {
        let start = row * comptime!(width);
        let label = labels[first as usize + row];
        let counts = label != ignored;
        // Whatever a label is, what is read lies in the row.
        let label = min(max(label, 0i32), comptime!((width * vector) as i32 - 1)) as usize;
        let (at, place) = (label / comptime!(vector), label % comptime!(vector));

        let mut top = f32::new(comptime!(LOWEST));
        let mut sum = 0.0f32;
        let mut place_of_top = 0u32;
        let mut column = unit;
        while column < comptime!(width) {
            let z = Vector::<f32, N>::cast_from(logits[start + column]);
            let mut largest = z.extract(0usize);
            let mut within = 0u32;
            #[unroll]
            for j in 1..comptime!(vector) {
                if z.extract(j) > largest {
                    largest = z.extract(j);
                    within = comptime!(j as u32).runtime();
                }
            }
            if largest > top {
                sum *= (top - largest).exp();
                top = largest;
                place_of_top = column as u32 * comptime!(vector as u32) + within;
            }
            sum += (z - Vector::new(top)).exp().vector_sum();
            column += comptime!(UNITS);
        }
        tops[unit] = top;
        sums[unit] = sum;
        if comptime!(warp) {
            places[unit] = place_of_top;
        }
        let mut own = 0.0f32;
        if unit == 0 {
            let z = Vector::<f32, N>::cast_from(logits[start + at]);
            #[unroll]
            for j in 0..comptime!(vector) {
                if place == j {
                    own = z.extract(j);
                }
            }
        }
        sync_cube();
        #[unroll]
        for bit in 0..comptime!(UNITS.ilog2()) {
            let stride = comptime!(UNITS >> (bit + 1));
            if unit < stride {
                let (a, b) = (tops[unit], tops[unit + stride]);
                let both = max(a, b);
                if comptime!(warp) {
                    // Of equal ones the first counts.
                    let (here, there) = (places[unit], places[unit + stride]);
                    let other = b > a || (b == a && there < here);
                    places[unit] = select(other, there, here);
                }
                sums[unit] = sums[unit] * (a - both).exp() + sums[unit + stride] * (b - both).exp();
                tops[unit] = both;
            }
            sync_cube();
        }
        let top = tops[0];
        let sum = sums[0];
        if unit == 0 {
            losses[first as usize + row] = select(counts, sum.ln() + top - own, 0.0f32);
        }
        if comptime!(gradient) {
            let factor = select(counts, 1.0f32 / sum, 0.0f32);
            let one = select(counts, 1.0f32, 0.0f32);
            let mut column = unit;
            while column < comptime!(width) {
                let z = Vector::<f32, N>::cast_from(logits[start + column]);
                let mut dz = (z - Vector::new(top)).exp() * Vector::new(factor);
                if column == at {
                    #[unroll]
                    for j in 0..comptime!(vector) {
                        if place == j {
                            dz.insert(j, dz.extract(j) - one);
                        }
                    }
                }
                if comptime!(warp) {
                    let top_at = places[0] as usize;
                    if column == top_at / comptime!(vector) {
                        #[unroll]
                        for j in 0..comptime!(vector) {
                            if top_at % comptime!(vector) == j {
                                dz.insert(j, dz.extract(j) + l2_warp * count[0] * top);
                            }
                        }
                    }
                }
                logits[start + column] = Vector::cast_from(dz);
                column += comptime!(UNITS);
            }
        }
        sync_cube();
        row += CUBE_COUNT_X as usize;
    }
}

/// `x ← x · by`, with `by` of one number.
#[cube(launch, address_type = "dynamic")]
pub(super) fn scale<E: Float, N: Size>(
    x: &mut Tensor<Vector<E, N>>,
    by: &Tensor<f32>,
    #[define(E)] _element: ElemType,
) {
    let factor = Vector::<f32, N>::new(by[0]);
    let mut at = ABSOLUTE_POS;
    while at < x.len() {
        x[at] = Vector::cast_from(Vector::<f32, N>::cast_from(x[at]) * factor);
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}
