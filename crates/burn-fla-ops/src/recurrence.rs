//! What the decayed linear recurrences share around their kernels and references: the checks of the arguments, the
//! defaults, packed sequences, and the choice of the engine.

use burn::tensor::{DType, Tensor};
#[cfg(feature = "cube")]
use burn::tensor::{Device, TensorData};

use crate::arguments::{self, query_key_value};
use crate::bridge::{has_kernels, same_device, same_shape};
use crate::sequences::{by_sequence, each_sequence};
use crate::ssd::HeadGroups;
use crate::{CuSeqlens, Engine, OpError, SequenceOptions};

/// Tokens a chunk of the reference with a decay by key: its factored scores hold further in a short chunk.
const REFERENCE_CHUNK_KEY: usize = 32;
/// Tokens a chunk of the reference with a scalar decay.
const REFERENCE_CHUNK_SCALAR: usize = 64;

/// What computes a problem. An engine on matrix units becomes one more name here, one more line in
/// [`Implementation::choose`], and a folder beside `linear_walk`; the checks, the reference and the suites are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Implementation {
    /// Chunked tensor operations, on any device.
    Reference,
    /// Kernels in plain f32 arithmetic, on any CubeCL device.
    #[cfg(feature = "cube")]
    Portable,
    /// Kernels on the tensor cores of Hopper GPUs, for bf16.
    #[cfg(feature = "cuda")]
    Hopper,
    /// Kernels on the tensor cores of NVIDIA GPUs since Ampere, for bf16.
    #[cfg(feature = "cuda")]
    Mma,
}

impl Implementation {
    /// The kernels take f32 and bf16 and need at least one token to launch over.
    fn choose(problem: &Problem) -> Self {
        let (device, tokens) = (problem.q.device(), problem.sequences.total());
        let kernels = has_kernels(&device, problem.engine) && problem.q.dtype() != DType::F64 && tokens > 0;
        match kernels {
            #[cfg(feature = "cuda")]
            true if (problem.engine == Engine::Mma || crate::hopper_walk::prefers_mma(problem))
                && crate::hopper_walk::takes_with_mma(problem) =>
            {
                Self::Mma
            }
            #[cfg(feature = "cuda")]
            true if crate::hopper_walk::takes(problem) => Self::Hopper,
            #[cfg(feature = "cuda")]
            true if crate::hopper_walk::takes_with_mma(problem) => Self::Mma,
            #[cfg(feature = "cube")]
            true => Self::Portable,
            _ => Self::Reference,
        }
    }
}

/// A log decay.
#[derive(Clone, Debug)]
pub(crate) enum Decay {
    None,
    /// `[H]`, constant, without autodiff.
    Head(Tensor<1>),
    /// `[B, T, H]`.
    Token(Tensor<3>),
    /// `[B, T, H, K]`.
    Key(Tensor<4>),
    /// `[B, T, H, V]`: `S_t = S_{t−1} diag(e^{g_t}) + k_t v_tᵀ`.
    Value(Tensor<4>),
}

/// The log decays of heads that do not decay.
#[cfg(feature = "cube")]
pub(crate) fn no_decay(heads: usize, device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::zeros::<f32, _>([heads]), (device, DType::F32))
}

/// A checked problem: `S_t = e^{g_t} ∘ S_{t−1} + k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.
pub(crate) struct Problem {
    /// Its name, for the kernels.
    #[cfg_attr(not(feature = "cube"), expect(dead_code))]
    pub(crate) op: &'static str,
    /// Queries and keys may have fewer heads than values: see [`HeadGroups`].
    pub(crate) q: Tensor<4>,
    pub(crate) k: Tensor<4>,
    pub(crate) v: Tensor<4>,
    pub(crate) groups: HeadGroups,
    pub(crate) decay: Decay,
    /// `u`, `[H, K]`, beside a decay by key: the state is read before the token, `o_t = scale · (S_{t−1} + (u ∘ k_t) v_tᵀ)ᵀ q_t`.
    pub(crate) bonus: Option<Tensor<2>>,
    pub(crate) scale: f64,
    pub(crate) state: Option<Tensor<4>>,
    pub(crate) sequences: CuSeqlens,
    pub(crate) packed: bool,
    pub(crate) engine: Engine,
    pub(crate) chunk: Option<usize>,
}

impl Problem {
    pub(crate) fn new(
        op: &'static str,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        decay: Decay,
        options: SequenceOptions,
    ) -> Result<Self, OpError> {
        query_key_value(op, &q, &k, &v)?;
        Self::grouped(op, [q, k, v], HeadGroups::Contiguous, decay, options)
    }

    /// A problem whose q, k and v were checked, with groups of heads that share q and k.
    pub(crate) fn grouped(
        op: &'static str,
        [q, k, v]: [Tensor<4>; 3],
        groups: HeadGroups,
        decay: Decay,
        options: SequenceOptions,
    ) -> Result<Self, OpError> {
        let [b, t, h, dv] = v.dims();
        let dk = q.dims()[3];
        let device = q.device();
        match &decay {
            Decay::None => {}
            Decay::Head(g) => {
                same_shape(op, "decay", g, [h], "[H]")?;
                same_device(op, "decay", g, &device)?;
            }
            Decay::Token(g) => {
                same_shape(op, "decay", g, [b, t, h], "[B, T, H]")?;
                same_device(op, "decay", g, &device)?;
            }
            Decay::Key(g) => {
                same_shape(op, "log_decay", g, [b, t, h, dk], "[B, T, H, K]")?;
                same_device(op, "log_decay", g, &device)?;
            }
            Decay::Value(g) => {
                same_shape(op, "log_decay", g, [b, t, h, dv], "[B, T, H, V]")?;
                same_device(op, "log_decay", g, &device)?;
            }
        }
        let packed = options.cu_seqlens.is_some();
        let sequences = arguments::sequences(options.cu_seqlens, b, t)?;
        if let Some(state) = &options.initial_state {
            let n = sequences.num_sequences();
            same_shape(op, "initial_state", state, [n, h, dk, dv], "[N, H, K, V]")?;
            same_device(op, "initial_state", state, &device)?;
        }
        arguments::chunk(op, options.chunk)?;
        let scale = options.scale.unwrap_or_else(|| (dk as f64).powf(-0.5));
        Ok(Self {
            op,
            q,
            k,
            v,
            groups,
            decay,
            bonus: None,
            scale,
            state: options.initial_state,
            sequences,
            packed,
            engine: options.engine,
            chunk: options.chunk,
        })
    }

    /// The same with queries and keys repeated in memory, where heads share them.
    pub(crate) fn with_own_heads(self) -> Self {
        let heads = self.v.dims()[2];
        let each = |x: Tensor<4>| {
            let [b, t, g, d] = x.dims();
            let repeat = heads / g;
            if repeat == 1 {
                return x;
            }
            let x: Tensor<5> = match self.groups {
                HeadGroups::Contiguous => x.reshape([b, t, g, 1, d]).expand([b, t, g, repeat, d]),
                HeadGroups::Tiled => x.reshape([b, t, 1, g, d]).expand([b, t, repeat, g, d]),
            };
            x.reshape([b, t, heads, d])
        };
        let (q, k) = (each(self.q), each(self.k));
        Self { q, k, ..self }
    }

    /// Whether it runs in bf16 on matrix units.
    pub(crate) fn on_matrix_units(&self) -> bool {
        #[cfg(feature = "cuda")]
        return self.cores().is_some();
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// The kernels for matrix units that it runs on.
    #[cfg(feature = "cuda")]
    pub(crate) fn cores(&self) -> Option<crate::hopper_walk::Cores> {
        match Implementation::choose(self) {
            Implementation::Hopper => Some(crate::hopper_walk::Cores::Hopper),
            Implementation::Mma => Some(crate::hopper_walk::Cores::Mma),
            _ => None,
        }
    }

    /// Runs on the engine that the device and the options choose.
    pub(crate) fn run(self) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        Ok(match Implementation::choose(&self) {
            Implementation::Reference => self.with_own_heads().reference(),
            #[cfg(feature = "cube")]
            Implementation::Portable => crate::linear_walk::planned(self, false).run_recurrence(),
            #[cfg(feature = "cuda")]
            Implementation::Hopper => crate::hopper_walk::run(self, crate::hopper_walk::Cores::Hopper),
            #[cfg(feature = "cuda")]
            Implementation::Mma => crate::hopper_walk::run(self, crate::hopper_walk::Cores::Mma),
        })
    }

    /// Whether one of its tensors is differentiated.
    #[cfg(feature = "cube")]
    pub(crate) fn is_tracked(&self) -> bool {
        let decay = match &self.decay {
            // A constant decay has no gradient.
            Decay::None | Decay::Head(_) => false,
            Decay::Token(g) => g.is_tracked(),
            Decay::Key(g) | Decay::Value(g) => g.is_tracked(),
        };
        decay
            || [&self.q, &self.k, &self.v].into_iter().chain(&self.state).any(Tensor::is_tracked)
            || self.bonus.as_ref().is_some_and(Tensor::is_tracked)
    }

    /// Whether kernels run it as one token a sequence: see [`crate::one_step`]. `tracked` as for [`Self::planned`].
    #[cfg(feature = "cube")]
    pub(crate) fn is_one_step(&self, tracked: bool) -> bool {
        Implementation::choose(self) == Implementation::Portable
            && crate::one_step::takes(&self.sequences, tracked || self.is_tracked())
    }

    /// The operator that would run it, for another operator to run as a part of itself, where it is one. Its inputs are q,
    /// k, v, the decay, and the initial state where there is one. `tracked` says whether something else than these tensors
    /// is differentiated.
    #[cfg(feature = "cube")]
    pub(crate) fn planned(self, tracked: bool) -> Result<crate::bridge::Planned, Box<Self>> {
        match Implementation::choose(&self) {
            Implementation::Reference => Err(Box::new(self)),
            Implementation::Portable => Ok(crate::linear_walk::planned(self, tracked)),
            #[cfg(feature = "cuda")]
            Implementation::Hopper => crate::hopper_walk::planned(self, crate::hopper_walk::Cores::Hopper),
            #[cfg(feature = "cuda")]
            Implementation::Mma => crate::hopper_walk::planned(self, crate::hopper_walk::Cores::Mma),
        }
    }

    /// [`Self::planned`], and the walk on matrix units in it, which takes Δ, A and D itself.
    #[cfg(feature = "cuda")]
    pub(crate) fn planned_with_steps(
        self,
        tracked: bool,
    ) -> Result<(Option<std::sync::Arc<crate::hopper_walk::HopperWalk>>, crate::bridge::Planned), Box<Self>> {
        match self.cores() {
            Some(cores) => {
                crate::hopper_walk::planned_with_steps(self, cores).map(|(walk, planned)| (Some(walk), planned))
            }
            None => Ok((None, self.planned(tracked)?)),
        }
    }

    /// Runs the chunked reference of another recurrence over these tokens, sequence by sequence. `inputs` are those by
    /// token; `dense` gets them, the state before them, and the tokens a chunk.
    pub(crate) fn each_sequence<const E: usize>(
        &self,
        inputs: [Tensor<4>; E],
        dense: impl Fn([Tensor<4>; E], Tensor<4>, usize) -> (Tensor<4>, Tensor<4>),
    ) -> (Tensor<4>, Tensor<4>) {
        let packed = self.packed.then_some(&self.sequences);
        let (o, state) = each_sequence(inputs, self.state_or_zeros(), packed, |inputs, state| {
            let chunk = self.chunk_of(REFERENCE_CHUNK_KEY, inputs[0].dims()[1]);
            dense(inputs, state, chunk)
        });
        (o.unwrap_or_else(|| self.v.clone()), state)
    }

    /// Tokens a chunk of the reference: a short sequence does not pay for a long one.
    fn chunk_of(&self, default: usize, tokens: usize) -> usize {
        self.chunk.unwrap_or_else(|| default.min(tokens.next_power_of_two()))
    }

    fn state_or_zeros(&self) -> Tensor<4> {
        let [_, _, h, dk] = self.q.dims();
        let dv = self.v.dims()[3];
        let n = self.sequences.num_sequences();
        let dtype = crate::chunked::compute_dtype(self.q.dtype());
        match &self.state {
            Some(state) => state.clone().cast(dtype),
            None => Tensor::zeros([n, h, dk, dv], (&self.q.device(), dtype)),
        }
    }

    fn reference(self) -> (Tensor<4>, Tensor<4>) {
        let state = self.state_or_zeros();
        if !self.packed {
            return self.reference_dense(self.q.clone(), self.k.clone(), self.v.clone(), self.decay.clone(), state);
        }
        let (o, states) = by_sequence(&self.sequences, |piece| {
            let state = piece.state(&state);
            if piece.length == 0 {
                return (None, state);
            }
            let decay = match &self.decay {
                Decay::None => Decay::None,
                Decay::Head(g) => Decay::Head(g.clone()),
                Decay::Token(g) => Decay::Token(piece.tokens(g)),
                Decay::Key(g) => Decay::Key(piece.tokens(g)),
                Decay::Value(g) => Decay::Value(piece.tokens(g)),
            };
            let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| piece.tokens(x));
            let (o, end) = self.reference_dense(q, k, v, decay, state);
            (Some(o), end)
        });
        (o.unwrap_or_else(|| self.v.clone()), Tensor::cat(states, 0))
    }

    fn reference_dense(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        decay: Decay,
        state: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let [b, t, h, _] = q.dims();
        if t == 0 {
            return (v, state);
        }
        let device = q.device();
        let chunk = |default: usize| self.chunk_of(default, t);
        let scalar = |g: Tensor<3>| {
            let c = chunk(REFERENCE_CHUNK_SCALAR);
            crate::simple_gla::reference::chunked(q.clone(), k.clone(), v.clone(), g, self.scale, state.clone(), c)
        };
        match decay {
            Decay::None => scalar(Tensor::zeros([b, t, h], (&device, DType::F32))),
            Decay::Head(g) => scalar(g.reshape([1, 1, h]).expand([b, t, h])),
            Decay::Token(g) => scalar(g),
            Decay::Key(g) => {
                let c = chunk(REFERENCE_CHUNK_KEY);
                match &self.bonus {
                    None => crate::gla::reference::chunked(q, k, v, g, self.scale, state, c),
                    Some(bonus) if t == 1 => {
                        crate::rwkv6::reference::recurrent([q, k, v, g], bonus.clone(), self.scale, state)
                    }
                    Some(bonus) => crate::rwkv6::reference::chunked([q, k, v, g], bonus.clone(), self.scale, state, c),
                }
            }
            Decay::Value(g) => {
                let c = chunk(REFERENCE_CHUNK_KEY);
                let (out, dtype) = (v.dtype(), crate::chunked::compute_dtype(v.dtype()));
                let [q, k, v, g] = [q, k, v, g].map(|x| x.cast(dtype));
                let (o, state) = crate::gsa::reference::read_slots(q, k, v, g, self.scale, state, c);
                (o.cast(out), state)
            }
        }
    }
}
