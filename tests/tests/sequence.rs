//! The sequence operators that run in tensor operations: the chunked form against the token recurrence, packed against
//! separate, a continued sequence against the whole, and gradients against finite differences. One file a family.

#[path = "sequence/key_decay.rs"]
mod key_decay;
#[path = "sequence/selective_scan.rs"]
mod selective_scan;
#[path = "sequence/ssd.rs"]
mod ssd;
#[path = "sequence/token_shift.rs"]
mod token_shift;

use burn_fla_ops::{ScalarDecay, SequenceOptions, simple_gla};
use burn_fla_tests::agree::{Input, assert_finite_differences, flat, view};

#[path = "sequence/attention.rs"]
mod attention;
#[path = "sequence/delta.rs"]
mod delta;
#[path = "sequence/linear.rs"]
mod linear;
#[path = "sequence/mesa_net.rs"]
mod mesa_net;
#[path = "sequence/path.rs"]
mod path;
#[path = "sequence/scans.rs"]
mod scans;
#[path = "sequence/slots.rs"]
mod slots;
#[path = "sequence/triangular.rs"]
mod triangular;

/// The harness itself, on an operator that another suite holds to its recurrence.
#[test]
fn finite_differences_of_simple_gla() {
    let [b, t, h, k, v] = [1, 5, 2, 3, 4];
    let inputs = [
        Input::new("q", &[b, t, h, k], (-1.0, 1.0)),
        Input::new("k", &[b, t, h, k], (-1.0, 1.0)),
        Input::new("v", &[b, t, h, v], (-1.0, 1.0)),
        Input::new("decay", &[b, t, h], (-1.0, 0.0)),
        Input::new("state", &[b, h, k, v], (-1.0, 1.0)),
    ];
    assert_finite_differences("simple_gla", &inputs, 12, 1e-8, |x| {
        let options = SequenceOptions { initial_state: Some(view(&x[4], [b, h, k, v])), ..Default::default() };
        let decay = ScalarDecay::PerToken(view(&x[3], [b, t, h]));
        let q = view(&x[0], [b, t, h, k]);
        let (o, end) = simple_gla(q, view(&x[1], [b, t, h, k]), view(&x[2], [b, t, h, v]), decay, options).unwrap();
        vec![flat(o), flat(end)]
    });
}
