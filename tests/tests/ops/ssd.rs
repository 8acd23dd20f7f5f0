//! `ssd` on devices with kernels, where it is one operator: what D has a number for, groups of heads, more heads than a cube
//! takes, each input tracked alone, and losses that use one of the outputs, against its recurrence in f64.

use burn::tensor::{DType, Device, Tensor};
use burn_fla_ops::ssd::reference::recurrent;
use burn_fla_ops::{HeadGroups, SsdOptions, bridge, ssd};
use burn_fla_tests::agree::{flat, view};
use burn_fla_tests::{assert_close, kernel_devices, numbers, reference_device, tensor, uniform};

const NAMES: [&str; 7] = ["x", "delta", "a", "b", "c", "skip", "state"];
const ALL: [bool; 7] = [true; 7];

/// D has a number for each head, or channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Skip {
    None,
    Head,
    Channel,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    tokens: usize,
    heads: usize,
    width: usize,
    groups: usize,
    states: usize,
    rule: HeadGroups,
    skip: Skip,
    /// Which inputs are tracked.
    tracked: [bool; 7],
    /// Which of the output and the state the loss uses.
    loss: [bool; 2],
}

const BASE: Case = Case {
    batch: 2,
    tokens: 70,
    heads: 4,
    width: 12,
    groups: 2,
    states: 9,
    rule: HeadGroups::Contiguous,
    skip: Skip::Head,
    tracked: ALL,
    loss: [true; 2],
};

impl Case {
    fn shapes(&self) -> [Vec<usize>; 7] {
        let &Case { batch, tokens, heads, width, groups, states, skip, .. } = self;
        [
            vec![batch, tokens, heads, width],
            vec![batch, tokens, heads],
            vec![heads],
            vec![batch, tokens, groups, states],
            vec![batch, tokens, groups, states],
            vec![if skip == Skip::Channel { heads * width } else { heads }],
            vec![batch, heads, states, width],
        ]
    }

    /// Outputs, then the gradients of what is tracked.
    fn run(&self, device: &Device, dtype: DType, public: bool) -> Vec<(String, Vec<f64>)> {
        let &Case { batch, tokens, heads, width, groups, states, rule, .. } = self;
        let device = device.clone().autodiff();
        let leaves: Vec<Tensor<1>> = (0..7)
            .map(|i| {
                let range = [(-1.0, 1.0), (0.0, 1.0), (-2.0, -0.1)][if i == 1 || i == 2 { i } else { 0 }];
                let count = self.shapes()[i].iter().product();
                let leaf: Tensor<1> = tensor(&uniform(i as u64, count, range), [count], &device, dtype);
                if self.tracked[i] { leaf.require_grad() } else { leaf }
            })
            .collect();
        let x = view(&leaves[0], [batch, tokens, heads, width]);
        let delta = view(&leaves[1], [batch, tokens, heads]);
        let [b, c] = [3, 4].map(|i: usize| view(&leaves[i], [batch, tokens, groups, states]));
        let skip = (self.skip != Skip::None).then(|| leaves[5].clone());
        let state = view(&leaves[6], [batch, heads, states, width]);
        let a = leaves[2].clone();
        let (y, end) = if public {
            let options = SsdOptions { skip, groups: rule, initial_state: Some(state), ..Default::default() };
            ssd(x, delta, a, b, c, options).expect("fitting operands")
        } else {
            recurrent(x, delta, a, b, c, skip, rule, state)
        };
        let outputs = [flat(y), flat(end)];
        let weighted = outputs.iter().zip(self.loss).enumerate().filter(|(_, (_, used))| *used).map(|(i, (y, _))| {
            let count = y.dims()[0];
            let weight: Tensor<1> = tensor(&uniform(50 + i as u64, count, (-1.0, 1.0)), [count], &device, dtype);
            (y.clone() * weight).sum()
        });
        let gradients = weighted.reduce(|a, b| a + b).expect("one of them is used").backward();
        let mut found: Vec<_> =
            ["y", "end"].iter().zip(outputs).map(|(name, y)| (name.to_string(), numbers(y))).collect();
        for (i, leaf) in leaves.iter().enumerate().filter(|(i, _)| self.tracked[*i]) {
            let grad = leaf.grad(&gradients).map_or_else(|| vec![0.0; leaf.dims()[0]], numbers);
            found.push((format!("gradient of {}", NAMES[i]), grad));
        }
        found
    }
}

fn check(cases: &[Case]) {
    bridge::poison_outputs(true);
    for (name, device) in kernel_devices() {
        for case in cases {
            let found = case.run(&device, DType::F32, true);
            let exact = case.run(&reference_device(), DType::F64, false);
            for ((what, found), (_, exact)) in found.iter().zip(&exact) {
                assert_close(&format!("{name}, {case:?}, {what}"), found, exact, 1e-5);
            }
        }
    }
}

#[test]
fn every_form_of_ssd_equals_the_recurrence() {
    let mut cases = Vec::new();
    for skip in [Skip::None, Skip::Head, Skip::Channel] {
        for rule in [HeadGroups::Contiguous, HeadGroups::Tiled] {
            cases.push(Case { skip, rule, heads: 6, ..BASE });
        }
        // Rows of an odd size, of more than a plane of units, and of one number; one head, and more than a cube has units.
        cases.push(Case { skip, heads: 3, groups: 1, width: 7, tokens: 65, ..BASE });
        cases.push(Case { skip, heads: 1, groups: 1, width: 300, tokens: 5, states: 3, ..BASE });
        cases.push(Case { skip, heads: 5, groups: 5, width: 1, tokens: 40, ..BASE });
        cases.push(Case { skip, heads: 300, groups: 3, width: 2, tokens: 6, states: 2, batch: 1, ..BASE });
    }
    // Sums over many tokens, in several cubes.
    cases.push(Case { tokens: 1030, heads: 3, groups: 1, width: 4, states: 4, ..BASE });
    check(&cases);
}

#[test]
fn each_input_of_ssd_may_be_tracked_alone() {
    let alone = |i: usize| std::array::from_fn(|j| i == j);
    let mut cases: Vec<Case> = (0..7).map(|i| Case { tracked: alone(i), tokens: 20, ..BASE }).collect();
    cases.push(Case { tracked: alone(5), skip: Skip::Channel, tokens: 20, ..BASE });
    // One token: what is tracked is not left to the step of generation.
    cases.extend([2, 5].map(|i| Case { tracked: alone(i), tokens: 1, ..BASE }));
    check(&cases);
}

#[test]
fn a_loss_may_use_one_output_of_ssd() {
    for skip in [Skip::Head, Skip::Channel] {
        check(&[[true, false], [false, true]].map(|loss| Case { loss, skip, tokens: 20, ..BASE }));
    }
}

#[test]
fn two_runs_of_ssd_are_equal_bit_for_bit() {
    for (_, device) in kernel_devices() {
        for skip in [Skip::Head, Skip::Channel] {
            let case = Case { skip, tokens: 200, ..BASE };
            assert_eq!(case.run(&device, DType::F32, true), case.run(&device, DType::F32, true), "{case:?}");
        }
    }
}
