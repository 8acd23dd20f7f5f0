//! Where parameters come from, and what they are called.
//!
//! A module is built from a [`ParamScope`], which knows the path of the module inside its model. The path is the
//! Hugging Face name, so the same construction either draws each weight from a generator seeded by the path or reads
//! it from a file under that name, without a renaming table.

use std::cell::RefCell;
use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};

use crate::NnError;
use crate::hub::TensorStore;
use crate::init::{Draws, Init};
use crate::models::Names;

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
    Outline,
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

    /// Parameters that have a shape and no values: for modules that are looked at and never run. They take no memory.
    pub fn outline(device: &Device) -> Self {
        Self { device: device.clone(), std: 0.0, kind: Kind::Outline }
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

    /// The scope of a module that the format knows under two names, `name` and `alias`: a file may have either or both.
    pub(crate) fn at_either(&self, name: &str, alias: &str) -> Self {
        let Kind::Stored { store, used, .. } = &self.source.kind else {
            return self.at(name);
        };
        let under = |name: &str| {
            let prefix = format!("{}.", self.full(name));
            store.names().filter(|stored| stored.starts_with(&prefix)).map(String::from).collect::<Vec<_>>()
        };
        if under(name).is_empty() {
            return self.at(alias);
        }
        used.borrow_mut().extend(under(alias));
        self.at(name)
    }

    fn full(&self, name: impl std::fmt::Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }

    /// A matrix, or the taps of a convolution: N(0, std).
    pub fn normal<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.start(name, shape, &Init::Normal)
    }

    /// A norm's weight: ones.
    pub fn ones<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.start(name, shape, &Init::Constant(1.0))
    }

    /// A bias: zeros.
    pub fn zeros<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        self.start(name, shape, &Init::Constant(0.0))
    }

    /// A parameter that starts as `init` says.
    pub fn start<const D: usize>(&self, name: &str, shape: [usize; D], init: &Init<'_>) -> Param<Tensor<D>> {
        self.param(name, shape, init, None)
    }

    /// A parameter that starts as `init` says. Files that lack it may hold it as row `row` of an older parameter of
    /// `rows` rows, called `stack`.
    pub fn start_or_row<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        init: &Init<'_>,
        stack: &str,
        [row, rows]: [usize; 2],
    ) -> Param<Tensor<D>> {
        self.param(name, shape, init, Some((self.full(stack), row, rows)))
    }

    fn param<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        init: &Init<'_>,
        older: Option<(String, usize, usize)>,
    ) -> Param<Tensor<D>> {
        let path = self.full(name);
        let device = &self.source.device;
        let without_values = || {
            let zeros = move |device: &Device, _| Tensor::zeros(shape, device);
            Param::uninitialized(ParamId::new(), zeros, device.clone(), true, shape.into())
        };
        let values = match &self.source.kind {
            Kind::Outline => return without_values(),
            Kind::Seeded(seed) => init.draw(&mut Draws::new(*seed, &path), &shape, self.source.std),
            Kind::Stored { store, used, problems } => {
                let values = match older {
                    Some((stack, row, rows)) if !store.contains(&path) && store.contains(&stack) => {
                        let count = shape.iter().product();
                        let values = store.read_f32(&stack, &[rows, count]);
                        used.borrow_mut().insert(stack);
                        values.map(|values| values[row * count..(row + 1) * count].to_vec())
                    }
                    _ => store.read_f32(&path, &shape),
                };
                used.borrow_mut().insert(path);
                match values {
                    Ok(values) => values,
                    Err(problem) => {
                        problems.borrow_mut().push(problem);
                        // Never read: `finish` refuses the whole module.
                        return without_values();
                    }
                }
            }
        };
        Param::from_data(TensorData::new(values, shape), device)
    }
}

/// The Hugging Face name of the parameter a visitor or mapper stands at.
///
/// Forward `enter_module` and `exit_module` to it. Variants of enums leave no trace in a name: which mixer a layer has
/// is said by the config.
#[derive(Clone, Debug, Default)]
pub struct ParamPath {
    segments: Vec<String>,
    names: Option<&'static Names>,
}

impl ParamPath {
    /// For a visit of a [`CausalLm`](crate::CausalLm) that has these names; the default is for any other module.
    pub fn named(names: &'static Names) -> Self {
        Self { segments: Vec::new(), names: Some(names) }
    }

    /// To be called from `enter_module`. A field `_2` is called `2`: its place in a sequence of the format.
    pub fn enter(&mut self, name: &str, container_type: &str) {
        if !container_type.starts_with("Enum:") {
            let place = name.strip_prefix('_').filter(|place| place.bytes().all(|byte| byte.is_ascii_digit()));
            self.segments.push(place.unwrap_or(name).to_string());
        }
    }

    /// To be called from `exit_module`.
    pub fn exit(&mut self, container_type: &str) {
        if !container_type.starts_with("Enum:") {
            self.segments.pop();
        }
    }

    /// The dotted name.
    pub fn name(&self) -> String {
        match self.names {
            Some(names) => names.of(&self.segments),
            None => self.segments.join("."),
        }
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

/// Every float parameter of `module` by the names of its fields, in their order. A
/// [`CausalLm`](crate::CausalLm) has [`named_parameters`](crate::CausalLm::named_parameters) of its own.
pub fn named_parameters<M: Module>(module: &M) -> Vec<NamedParam> {
    parameters_from(module, ParamPath::default())
}

pub(crate) fn parameters_from<M: Module>(module: &M, path: ParamPath) -> Vec<NamedParam> {
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
    let mut collect = Collect { path, found: Vec::new() };
    module.visit(&mut collect);
    collect.found
}
