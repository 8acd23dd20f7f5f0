//! One token a sequence, as generation has it: state in, state out.

use burn::tensor::{DType, Device, Tensor, capture};
use burn_fla_ops::SequenceOptions;
use burn_fla_tests::operators::{Draw, Size};
use burn_fla_tests::{numbers, ratio};
use serde_json::json;

use super::case::{Chosen, Machine};
use super::timing::median;

/// Steps in one captured graph: what the host does between them is not timed. The first copies the state that it starts from.
const STEPS: usize = 32;

/// Times steps of `size.b` sequences, checked against the reference engine in f32 from the same state. Returns whether all were
/// right.
pub(crate) fn run(plain: &Device, chosen: Chosen, size: Size, machine: &Machine) -> bool {
    let size = Size { t: 1, ..size };
    let Size { b, h, k, v, .. } = size;
    let draw = Draw { device: plain.clone().autodiff(), size, dtype: DType::BF16, wide: DType::F32 };
    let inputs: Vec<Tensor<4>> =
        (chosen.operator.inputs)(&draw).into_iter().map(|input| input.tensor.inner()).collect();
    let first = draw.normal([b, h, k, v]).inner();
    let step = |inputs: &[Tensor<4>], state: Tensor<4>, options: SequenceOptions| {
        let options = SequenceOptions { initial_state: Some(state), ..options };
        let result = (chosen.operator.forward)(inputs, options);
        let (o, state) = result.unwrap_or_else(|error| panic!("{error}"));
        state.map(|state| (o, state))
    };
    let (name, engine) = (chosen.operator.name, chosen.engine_name());
    let Some((o, next)) = step(&inputs, first.clone(), chosen.options()) else {
        eprintln!("step {name}: its state is not one tensor");
        return true;
    };
    let wide: Vec<Tensor<4>> = inputs.iter().map(|x| x.clone().cast(DType::F32)).collect();
    let reference = SequenceOptions { engine: burn_fla_ops::Engine::Reference, ..Default::default() };
    let (right_o, right_next) = step(&wide, first.clone(), reference).expect("as above");
    let errors = [ratio(&numbers(o), &numbers(right_o)), ratio(&numbers(next), &numbers(right_next))];
    // o is rounded to bf16; the state is not.
    if errors[0].is_nan() || errors[0] > 3e-3 || errors[1].is_nan() || errors[1] > 1e-4 {
        eprintln!("step {name} {engine} {size}: WRONG: o {:.1e}, state {:.1e}", errors[0], errors[1]);
        return false;
    }
    let walk = |state: Tensor<4>| {
        let mut state = Some(state);
        for _ in 0..STEPS {
            let (o, next) = step(&inputs, state.take().expect("a state"), chosen.options()).expect("as above");
            drop(o);
            state = Some(next);
        }
        state.expect("a state")
    };
    // With the host's time: a state of its own that each step takes over.
    let mut state = Some(first.clone() * 1.0);
    let looped = median(plain, || state = Some(walk(state.take().expect("a state")))) / STEPS as f64;
    drop(state);
    let start = first.clone() * 1.0;
    let mut graph = capture(plain, || walk(start.clone()));
    let hardware = graph.is_hardware();
    // SAFETY: the operands live as long as the graph.
    let captured = median(plain, || drop(unsafe { graph.replay() }.clone())) / STEPS as f64;
    let bytes = (2 * b * h * k * v * 4) as f64;
    let floor = bytes / machine.copy;
    eprintln!(
        "step {name} {engine} {size}: {:.4} ms a step, {:.4} in a graph{}, {:.2} TB/s, {:.2} of the floor; o {:.1e}, state {:.1e}",
        looped * 1e3,
        captured * 1e3,
        if hardware { "" } else { " (of the host)" },
        bytes / captured / 1e12,
        captured / floor,
        errors[0],
        errors[1],
    );
    let row = json!({
        "operator": name,
        "engine": engine,
        "step": true,
        "shape": [b, 1, h, k, v],
        "key_heads": size.key_heads,
        "device": machine.name,
        "step_ms": looped * 1e3,
        "graph_ms": captured * 1e3,
        "floor_ms": floor * 1e3,
        "copy_TB_s": machine.copy / 1e12,
        "errors": { "o": errors[0], "state": errors[1] },
    });
    println!("{row}");
    true
}
