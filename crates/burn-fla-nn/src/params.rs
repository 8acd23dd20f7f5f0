//! Where parameters come from, and what they are called.
//!
//! A module is built from a [`ParamScope`], which knows the path of the module inside its model. The path is the
//! Hugging Face name, so the same construction either draws each weight from a generator seeded by the path or reads
//! it from a file under that name, without a renaming table.

use std::cell::RefCell;
use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::NnError;
use crate::hub::TensorStore;

/// Where the parameters of a new module come from.
#[derive(Debug)]
pub struct ParamSource<'a> {
    device: Device,
    std: f64,
    kind: Kind<'a>,
}

#[derive(Debug)]
enum Kind<'a> {
    Seeded(u64),
    Stored { store: &'a TensorStore, used: RefCell<BTreeSet<String>>, problems: RefCell<Vec<String>> },
}

impl<'a> ParamSource<'a> {
    /// Draws each parameter from a ChaCha stream that depends on `seed` and on the parameter's path alone: neither the
    /// order of construction nor the number of layers changes what a parameter starts from. Matrices follow
    /// N(0, `std`).
    pub fn seeded(seed: u64, std: f64, device: &Device) -> Self {
        Self { device: device.clone(), std, kind: Kind::Seeded(seed) }
    }

    /// Reads each parameter from `store`. What is missing or of another shape is gathered and told by
    /// [`finish`](Self::finish).
    pub fn stored(store: &'a TensorStore, device: &Device) -> Self {
        Self {
            device: device.clone(),
            std: 0.0,
            kind: Kind::Stored { store, used: RefCell::default(), problems: RefCell::default() },
        }
    }

    /// The outermost scope.
    pub fn root(&self) -> ParamScope<'_, 'a> {
        ParamScope { source: self, path: String::new() }
    }

    /// To be called when the module is built.
    ///
    /// # Errors
    /// [`NnError::Tensors`] when a stored tensor was missing, misshapen, of a type that cannot be read, or not asked
    /// for by the module: all of them in one error.
    pub fn finish(self) -> Result<(), NnError> {
        let Kind::Stored { store, used, problems } = self.kind else {
            return Ok(());
        };
        let (used, mut problems) = (used.into_inner(), problems.into_inner());
        problems.extend(
            store.names().filter(|name| !used.contains(*name)).map(|name| format!("unexpected tensor `{name}`")),
        );
        if problems.is_empty() {
            return Ok(());
        }
        Err(NnError::Tensors { origin: store.origin(), problems })
    }
}

/// A place inside a module tree while it is built.
#[derive(Clone, Debug)]
pub struct ParamScope<'s, 'a> {
    source: &'s ParamSource<'a>,
    path: String,
}

impl<'s, 'a> ParamScope<'s, 'a> {
    /// The scope of the field or list element `name`.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { source: self.source, path: self.full(name) }
    }

    fn full(&self, name: impl std::fmt::Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// A matrix, or the taps of a convolution: N(0, std).
    pub fn normal<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.param(name, shape, |seed, std, path, n| normal(seed, path, std, n))
    }

    /// A norm's weight: ones.
    pub fn ones<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.param(name, shape, |_, _, _, n| vec![1.0; n])
    }

    /// A bias: zeros.
    pub fn zeros<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.param(name, shape, |_, _, _, n| vec![0.0; n])
    }

    fn param<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        draw: impl FnOnce(u64, f64, &str, usize) -> Vec<f32>,
    ) -> Param<Tensor<D>> {
        let path = self.full(name);
        let device = &self.source.device;
        let values = match &self.source.kind {
            Kind::Seeded(seed) => draw(*seed, self.source.std, &path, shape.iter().product()),
            Kind::Stored { store, used, problems } => {
                let values = store.read_f32(&path, &shape);
                used.borrow_mut().insert(path);
                match values {
                    Ok(values) => values,
                    Err(problem) => {
                        problems.borrow_mut().push(problem);
                        // Never read: `finish` refuses the whole module.
                        return Param::uninitialized(
                            ParamId::new(),
                            move |device, _| Tensor::zeros(shape, device),
                            device.clone(),
                            true,
                            shape.into(),
                        );
                    }
                }
            }
        };
        Param::from_data(TensorData::new(values, shape), device)
    }
}

/// `count` draws of N(0, std) from the stream of (`seed`, `path`), by the Box–Muller transform.
fn normal(seed: u64, path: &str, std: f64, count: usize) -> Vec<f32> {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&fnv1a(0xcbf2_9ce4_8422_2325, path).to_le_bytes());
    // A second hash from another start, so that two paths would have to collide twice to share a stream.
    key[16..24].copy_from_slice(&fnv1a(0x9e37_79b9_7f4a_7c15, path).to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    // 53 random bits in (0, 1]: the logarithm below stays finite.
    let mut uniform = || ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let radius = std * (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * uniform()).sin_cos();
        values.push((radius * cos) as f32);
        values.push((radius * sin) as f32);
    }
    values.truncate(count);
    values
}

fn fnv1a(start: u64, text: &str) -> u64 {
    text.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The Hugging Face name of the parameter a visitor or mapper stands at.
///
/// Forward `enter_module` and `exit_module` to it. Variants of enums leave no trace in a name: which mixer a layer has
/// is said by the config.
#[derive(Clone, Debug, Default)]
pub struct ParamPath(Vec<String>);

impl ParamPath {
    /// To be called from `enter_module`.
    pub fn enter(&mut self, name: &str, container_type: &str) {
        if !container_type.starts_with("Enum:") {
            self.0.push(name.to_string());
        }
    }

    /// To be called from `exit_module`.
    pub fn exit(&mut self, container_type: &str) {
        if !container_type.starts_with("Enum:") {
            self.0.pop();
        }
    }

    /// The dotted name.
    pub fn name(&self) -> String {
        self.0.join(".")
    }
}

/// A parameter's name, identity and shape.
#[derive(Clone, Debug)]
pub struct NamedParam {
    /// Hugging Face name, `model.layers.0.attn.q_proj.weight`.
    pub name: String,
    /// Burn's identity of the parameter.
    pub id: ParamId,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Every float parameter of `module` by its Hugging Face name, in the order of the fields.
pub fn named_parameters<M: Module>(module: &M) -> Vec<NamedParam> {
    #[derive(Default)]
    struct Collect {
        path: ParamPath,
        found: Vec<NamedParam>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.found.push(NamedParam { name: self.path.name(), id: param.id, shape: param.lazy_shape().to_vec() });
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, container_type: &str) {
            self.path.exit(container_type);
        }
    }
    let mut collect = Collect::default();
    module.visit(&mut collect);
    collect.found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_seed_and_path_alone() {
        assert_eq!(normal(1, "a", 0.02, 7), normal(1, "a", 0.02, 7));
        assert_ne!(normal(1, "a", 0.02, 7), normal(1, "b", 0.02, 7));
        assert_ne!(normal(1, "a", 0.02, 7), normal(2, "a", 0.02, 7));
        assert_eq!(normal(1, "a", 0.02, 4), normal(1, "a", 0.02, 8)[..4]);
    }

    #[test]
    fn draws_are_normal() {
        let draws = normal(3, "x", 0.5, 100_001);
        let mean = draws.iter().map(|x| f64::from(*x)).sum::<f64>() / draws.len() as f64;
        let moment = |p: i32| draws.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((moment(2).sqrt() - 0.5).abs() < 0.01);
        // Kurtosis of a normal distribution is 3.
        assert!((moment(4) / moment(2).powi(2) - 3.0).abs() < 0.1);
    }
}
