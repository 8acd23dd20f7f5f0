//! An operator's outputs and gradients beside those of its recurrence.

use std::collections::BTreeMap;
use std::thread::JoinHandle;

use burn::tensor::Tensor;

use super::operator::{Input, Kind, Operator, Size};
use crate::{numbers, ratio};

/// Which heads of which rows are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heads {
    /// The first, the one in the middle and the last. What several of them share as an input has a gradient that is their
    /// sum, and is not compared.
    Three,
    /// All, and what they share.
    All,
}

/// A relative RMS error.
#[derive(Clone, Debug)]
pub struct Error {
    /// o, or the input whose gradient it is of.
    pub name: &'static str,
    /// The error, infinite where a number was not finite or a gradient was missing.
    pub found: f64,
    /// The most that it may be.
    pub bound: f64,
}

impl Error {
    /// Whether it is over its bound.
    pub fn is_wrong(&self) -> bool {
        self.found.is_nan() || self.found > self.bound
    }
}

/// A comparison whose recurrence is under way, in a thread for each head.
pub struct Check {
    operator: &'static Operator,
    names: Vec<(&'static str, Kind)>,
    heads: Vec<Head>,
    /// Of a row.
    heads_of_a_row: usize,
    shared: Vec<Shared>,
}

struct Head {
    row: usize,
    head: usize,
    /// o and the gradients of this head; none of what is shared or constant.
    found: Vec<Option<Vec<f64>>>,
    exact: JoinHandle<Vec<Vec<f64>>>,
}

/// The whole gradient of an input that heads share.
struct Shared {
    /// Its place behind o.
    at: usize,
    dims: [usize; 4],
    found: Vec<f64>,
}

/// What head `head` of `of` of a row sees of a tensor.
fn cut(x: &Tensor<4>, row: usize, head: usize, of: usize) -> Vec<f64> {
    let [rows, _, heads, _] = x.dims();
    let x = if rows == 1 { x.clone() } else { x.clone().narrow(0, row, 1) };
    numbers(x.narrow(2, head * heads / of, 1))
}

/// A head's gradient of fewer numbers is compared with those of the other heads: one number alone, a sum over all tokens,
/// can be as near 0 as it likes.
const FEW: usize = 8;

impl Check {
    /// Reads what is compared from the device and starts the recurrence. `gradients` are those of `inputs`, in order; an
    /// operator's outputs are `o`, whose gradient was `grad`. Tensors without autodiff.
    pub fn start(
        operator: &'static Operator,
        size: Size,
        inputs: &[Input],
        grad: &Tensor<4>,
        o: &Tensor<4>,
        gradients: &[Option<Tensor<4>>],
        which: Heads,
    ) -> Self {
        let Size { b, h, .. } = size;
        let heads: Vec<usize> = match which {
            Heads::All => (0..b * h).collect(),
            Heads::Three => {
                let mut some = vec![0, b * h / 2, b * h - 1];
                some.dedup();
                some
            }
        };
        let plain: Vec<Tensor<4>> = inputs.iter().map(|input| input.tensor.clone().inner()).collect();
        let is_shared = |x: &Tensor<4>| {
            let [rows, _, heads, _] = x.dims();
            (rows == 1 && b > 1) || heads < h
        };
        let one = |at: usize| {
            let (row, head) = (at / h, at % h);
            let x: Vec<Vec<f64>> = plain.iter().map(|x| cut(x, row, head, h)).collect();
            let seen = cut(grad, row, head, h);
            let exact = std::thread::spawn(move || (operator.exact)(&x, &seen, size));
            let mut found = vec![Some(cut(o, row, head, h))];
            for ((input, x), gradient) in inputs.iter().zip(&plain).zip(gradients) {
                let compared = input.kind != Kind::Constant && !is_shared(x);
                // A missing gradient is compared as one without numbers, which is wrong.
                found.push(compared.then(|| gradient.as_ref().map_or_else(Vec::new, |x| cut(x, row, head, h))));
            }
            Head { row, head, found, exact }
        };
        let heads = heads.into_iter().map(one).collect();
        let whole = |(i, (input, gradient)): (usize, (&Input, &Option<Tensor<4>>))| {
            let compared = which == Heads::All && input.kind != Kind::Constant && is_shared(&plain[i]);
            let found = || gradient.as_ref().map_or_else(Vec::new, |x| numbers(x.clone()));
            compared.then(|| Shared { at: 1 + i, dims: plain[i].dims(), found: found() })
        };
        let shared = inputs.iter().zip(gradients).enumerate().filter_map(whole).collect();
        let names = inputs.iter().map(|input| (input.name, input.kind)).collect();
        Self { operator, names, heads, heads_of_a_row: h, shared }
    }

    /// Waits for the recurrence. What was not compared is left out.
    ///
    /// # Panics
    /// Where the recurrence panics.
    pub fn finish(self) -> Vec<Error> {
        let Self { operator, names, heads, heads_of_a_row, shared } = self;
        let mut errors: Vec<Option<f64>> = vec![None; 1 + names.len()];
        let mut note = |at: usize, found: &[f64], exact: &[f64]| {
            let error = if found.len() == exact.len() { ratio(found, exact) } else { f64::INFINITY };
            errors[at] = Some(errors[at].map_or(error, |before: f64| before.max(error)));
        };
        let mut sums: Vec<Vec<f64>> = shared.iter().map(|x| vec![0.0; x.dims.iter().product()]).collect();
        let mut few: BTreeMap<usize, [Vec<f64>; 2]> = BTreeMap::new();
        for Head { row, head, found, exact } in heads {
            let exact = exact.join().expect("the recurrence");
            for (at, found) in found.iter().enumerate() {
                match found {
                    Some(found) if found.len() == exact[at].len() && found.len() < FEW => {
                        let [all, right] = few.entry(at).or_default();
                        all.extend(found);
                        right.extend(&exact[at]);
                    }
                    Some(found) => note(at, found, &exact[at]),
                    None => {}
                }
            }
            for (sum, Shared { at, dims: [rows, tokens, heads, width], .. }) in sums.iter_mut().zip(&shared) {
                let (row, head) = (row.min(rows - 1), head * heads / heads_of_a_row);
                for (i, part) in exact[*at].chunks(*width).enumerate() {
                    let start = ((row * tokens + i) * heads + head) * width;
                    sum[start..start + width].iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        few.iter().for_each(|(at, [found, exact])| note(*at, found, exact));
        for (sum, Shared { at, found, .. }) in sums.iter().zip(&shared) {
            note(*at, found, sum);
        }
        let bounds = operator.bounds;
        let all = [("o", bounds.output)].into_iter().chain(names.into_iter().map(|(name, kind)| match kind {
            Kind::Gate => (name, bounds.gate),
            _ => (name, bounds.channels),
        }));
        all.zip(errors).filter_map(|((name, bound), found)| Some(Error { name, found: found?, bound })).collect()
    }
}
