//! The launches: parameters sorted by size and grouped, so that a launch has as many as the device binds and few idle
//! cubes.

use burn::tensor::{DType, Shape, Tensor};
use cubecl::prelude::*;

use super::kernels::{self, FACTORS};
use super::{AdamWOptions, AdamWSlot, AdamWStep, AdamWUpdated, COUNTERS};
use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, apply, contiguous, owned, zeros};
use crate::rows::{RowPlan, UNITS, address, vector_size};

/// The most parameters of a launch: each is unrolled in the kernel.
const MAX_LIST: usize = 16;
/// The most cubes that work on one parameter: with 256 units each, enough for a large GPU.
const MAX_PARTS: usize = 1024;
/// Buffers of a launch beside those of its parameters: factors or partial sums, and what CubeCL passes beside tensors.
const OTHER_BINDINGS: usize = 2;
/// Buffers of one parameter: value, gradient, two moments.
const BINDINGS: usize = 4;

/// Inputs: the counters, then value, gradient, first and second moment of each parameter. Outputs: the counters, the
/// norm, then value, first and second moment of each parameter.
#[derive(Debug)]
struct AdamW {
    options: AdamWOptions,
    /// `lr_scale` and `weight_decay` of each parameter.
    rules: Vec<(f64, f64)>,
}

struct Slot {
    value: CubeTensor,
    grad: CubeTensor,
    first: CubeTensor,
    second: CubeTensor,
    rule: (f64, f64),
}

impl Slot {
    fn len(&self) -> usize {
        self.grad.meta.shape().num_elements()
    }
}

pub(super) fn run(slots: Vec<AdamWSlot>, counters: Tensor<1>, options: AdamWOptions) -> AdamWStep {
    let rules = slots.iter().map(|slot| (slot.lr_scale, slot.weight_decay)).collect();
    let mut floats = vec![counters.into_dispatch()];
    for slot in slots {
        floats.extend([slot.value, slot.grad, slot.first, slot.second].map(Tensor::into_dispatch));
    }
    let mut outputs = apply(AdamW { options, rules }, floats, Vec::new()).into_iter().map(Tensor::from_dispatch);
    let mut next = || outputs.next();
    let missing = "as many outputs as announced";
    let (counters, norm) = (next().expect(missing), next().expect(missing));
    let mut updated = Vec::new();
    while let Some(value) = next() {
        updated.push(AdamWUpdated { value, first: next().expect(missing), second: next().expect(missing) });
    }
    AdamWStep { updated, counters, norm }
}

/// The parameters in the order in which they are launched, cut into lists: those of one list have one vector size, and
/// are of about one size. The sort is stable, so that the order never depends on anything but the sizes.
fn lists(sizes: &[usize], most: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..sizes.len()).filter(|at| sizes[*at] > 0).collect();
    order.sort_by_key(|at| (vector_size(sizes[*at]), std::cmp::Reverse(sizes[*at])));
    let mut lists: Vec<Vec<usize>> = Vec::new();
    for at in order {
        match lists.last_mut() {
            Some(list) if list.len() < most && vector_size(sizes[list[0]]) == vector_size(sizes[at]) => list.push(at),
            _ => lists.push(vec![at]),
        }
    }
    lists
}

/// Cubes for each parameter of a list: as many as the largest needs at four vectors a unit.
fn parts(sizes: &[usize], list: &[usize]) -> usize {
    let size = sizes[list[0]];
    (size / vector_size(size)).div_ceil(UNITS * 4).min(MAX_PARTS)
}

fn all<T: LaunchArg<RuntimeArg = TensorArg>>(list: &[usize], tensor: impl Fn(usize) -> CubeTensor) -> SequenceArg<T> {
    list.iter().map(|at| tensor(*at).into_tensor_arg()).collect()
}

impl AdamW {
    /// Σ g² of every cube, `[cubes]`.
    fn squares(&self, slots: &[Slot], sizes: &[usize], plan: RowPlan, bindings: usize) -> CubeTensor {
        let lists = lists(sizes, (bindings - OTHER_BINDINGS).min(4 * MAX_LIST));
        let cubes: usize = lists.iter().map(|list| list.len() * parts(sizes, list)).sum();
        if cubes == 0 {
            return zeros(&slots[0].grad, [1], DType::F32);
        }
        let partial = alloc(&slots[0].grad, [cubes], DType::F32);
        let mut first = 0;
        for list in &lists {
            let parts = parts(sizes, list);
            let grads: Vec<&CubeTensor> = list.iter().map(|at| &slots[*at].grad).collect();
            kernels::squares::launch(
                &partial.client,
                CubeCount::Static(parts as u32, list.len() as u32, 1),
                CubeDim::new_1d(UNITS as u32),
                address(&grads),
                vector_size(sizes[list[0]]),
                all(list, |at| slots[at].grad.clone()),
                partial.clone().into_tensor_arg(),
                first as u32,
                plan,
            );
            first += list.len() * parts;
        }
        partial
    }

    /// Makes the factors; returns them with the counters and the norm.
    fn factors(&self, partial: CubeTensor, counters: CubeTensor, plan: RowPlan) -> [CubeTensor; 3] {
        let options = &self.options;
        let factors = alloc(&partial, [FACTORS], DType::F32);
        let next = alloc(&partial, [COUNTERS], DType::F32);
        let norm = alloc(&partial, [1], DType::F32);
        kernels::factors::launch(
            &partial.client.clone(),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(UNITS as u32),
            address(&[&partial]),
            partial.into_tensor_arg(),
            counters.into_tensor_arg(),
            next.clone().into_tensor_arg(),
            norm.clone().into_tensor_arg(),
            factors.clone().into_tensor_arg(),
            options.beta1 as f32,
            options.beta2 as f32,
            (1.0 - options.beta1) as f32,
            (1.0 - options.beta2) as f32,
            options.max_norm as f32,
            options.max_norm > 0.0,
            options.skip_non_finite,
            plan,
        );
        [factors, next, norm]
    }

    fn update(&self, slots: &[Slot], sizes: &[usize], factors: CubeTensor, bindings: usize) {
        let options = &self.options;
        let most = ((bindings - OTHER_BINDINGS) / BINDINGS).clamp(1, MAX_LIST);
        for list in lists(sizes, most) {
            let scalars = |number: &dyn Fn((f64, f64)) -> f64| -> SequenceArg<f32> {
                list.iter().map(|at| number(slots[*at].rule) as f32).collect()
            };
            let values: Vec<&CubeTensor> = list.iter().map(|at| &slots[*at].value).collect();
            kernels::update::launch(
                &factors.client,
                CubeCount::Static(parts(sizes, &list) as u32, list.len() as u32, 1),
                CubeDim::new_1d(UNITS as u32),
                address(&values),
                vector_size(sizes[list[0]]),
                all(&list, |at| slots[at].value.clone()),
                all(&list, |at| slots[at].grad.clone()),
                all(&list, |at| slots[at].first.clone()),
                all(&list, |at| slots[at].second.clone()),
                scalars(&|(lr_scale, _)| options.lr * lr_scale),
                scalars(&|(lr_scale, weight_decay)| 1.0 - options.lr * lr_scale * weight_decay),
                factors.clone().into_tensor_arg(),
                options.beta1 as f32,
                options.beta2 as f32,
                (1.0 - options.beta1) as f32,
                (1.0 - options.beta2) as f32,
                options.eps as f32,
            );
        }
    }
}

impl Operator for AdamW {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        let counters = inputs[0].clone();
        let norm = TensorSpec::new(Shape::from([1]), DType::F32);
        let slots = inputs[1..].chunks(BINDINGS).flat_map(|slot| [&slot[0], &slot[2], &slot[3]]);
        [counters, norm].into_iter().chain(slots.cloned()).collect()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter();
        let mut next = || inputs.next();
        let missing = "four tensors of each parameter";
        let counters = contiguous(next().expect(missing));
        let mut slots = Vec::with_capacity(self.rules.len());
        for rule in &self.rules {
            slots.push(Slot {
                value: owned(next().expect(missing)),
                grad: contiguous(next().expect(missing)),
                first: owned(next().expect(missing)),
                second: owned(next().expect(missing)),
                rule: *rule,
            });
        }
        let sizes: Vec<usize> = slots.iter().map(Slot::len).collect();
        let bindings = counters.client.properties().hardware.max_bindings as usize;
        let plan = RowPlan::whole_cube(&counters);
        let partial = self.squares(&slots, &sizes, plan, bindings);
        let [factors, counters, norm] = self.factors(partial, counters, plan);
        self.update(&slots, &sizes, factors, bindings);
        let slots = slots.into_iter().flat_map(|slot| [slot.value, slot.first, slot.second]);
        [counters, norm].into_iter().chain(slots).collect()
    }

    fn backward(
        &self,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        unreachable!("an update has no gradient: tracked tensors are refused")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_parameter_is_in_one_list_of_its_own_kind() {
        let sizes = [7, 4096, 0, 8, 9, 1_000_000, 12, 2, 6];
        for most in [1, 2, 16] {
            let lists = lists(&sizes, most);
            let mut seen: Vec<usize> = lists.iter().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, [0, 1, 3, 4, 5, 6, 7, 8], "an empty parameter needs no launch");
            for list in &lists {
                assert!(list.len() <= most);
                assert!(list.iter().all(|at| vector_size(sizes[*at]) == vector_size(sizes[list[0]])));
                assert!(list.iter().all(|at| sizes[*at] <= sizes[list[0]]), "the first of a list is the largest");
            }
        }
    }
}
