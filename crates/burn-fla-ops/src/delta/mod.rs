//! What the operators of the delta rule share: the recurrence that they are all cases of, the checks of the arguments,
//! packed sequences and the references.
//!
//! ```text
//! r_t = v_t − S̃ᵀ p_t                              what the state does not hold yet of v_t
//! S_t = e^{g_t} ∘ S_{t−1} + β_t k_t r_tᵀ          S: [K, V]
//! o_t = scale · S_tᵀ q_t
//! ```
//!
//! The delta rule reads with its key, `p_t = k_t`, from the state after the decay, `S̃ = e^{g_t} ∘ S_{t−1}`; Comba reads
//! with a vector of its own from the state before the decay, `S̃ = S_{t−1}`. The decay is none, a number for each token
//! and head, or one for each key channel besides. Value heads may outnumber key heads: value head `i` of `HV` uses key
//! head `⌊i · H / HV⌋`.

mod chunked;
pub mod reference;

use burn::tensor::{DType, Device, Tensor};

use crate::arguments::activation;
use crate::bridge::{same_device, same_dtype, same_shape};
use crate::chunked::compute_dtype;
use crate::l2_norm::{self, reference::l2_norm};
use crate::sequences::by_sequence;
use crate::{CuSeqlens, DecayGate, Engine, OpError, SequenceOptions, decay_gate};

/// Tokens a chunk where the decay is by key: its scores take pairs of tokens.
const CHUNK_KEY: usize = 32;
/// Tokens a chunk elsewhere.
const CHUNK: usize = 64;

/// Options of the operators of the delta rule.
#[derive(Clone, Debug, Default)]
pub struct DeltaOptions {
    /// Scale, initial state, packed sequences, engine and chunk. With `HV` value heads the state is `[N, HV, K, V]`.
    pub sequence: SequenceOptions,
    /// Whether queries and keys (and what Comba reads with) are divided by their L2 norm first, as
    /// [`l2_norm`](crate::l2_norm()) does with [`EPS`](crate::l2_norm::EPS).
    pub l2_norm: bool,
    /// Where it is given, the log decay of a call is the input a of this gate, and the decay is
    /// `exp(−e^A ∘ softplus(a + b))`, see [`decay_gate`](crate::decay_gate()). A decay by key has one A for each head, or
    /// for each channel, `[HV·K]`, and a bias for each channel.
    pub decay_gate: Option<DecayGate>,
}

impl From<SequenceOptions> for DeltaOptions {
    fn from(sequence: SequenceOptions) -> Self {
        Self { sequence, ..Default::default() }
    }
}

/// A log decay.
pub(crate) enum Gate {
    /// `[B, T, HV]`
    Token(Tensor<3>),
    /// `[B, T, HV, K]`
    Key(Tensor<4>),
}

/// The arguments of an operator of the delta rule.
pub(crate) struct Arguments {
    pub(crate) op: &'static str,
    /// `[B, T, H, K]`
    pub(crate) q: Tensor<4>,
    /// `[B, T, H, K]`
    pub(crate) k: Tensor<4>,
    /// `[B, T, HV, V]`
    pub(crate) v: Tensor<4>,
    /// What the state before the decay is read with, `[B, T, H, K]`; `None`: the key reads the state after it.
    pub(crate) p: Option<Tensor<4>>,
    /// `None`: the state is kept whole.
    pub(crate) gate: Option<Gate>,
    /// `[B, T, HV]`
    pub(crate) beta: Tensor<3>,
    pub(crate) options: DeltaOptions,
}

/// The operands of one run over dense rows, in the dtype in which they are computed, all with `HV` heads.
#[derive(Clone)]
struct Operands {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    p: Option<Tensor<4>>,
    /// `[B, T, HV, 1]` or `[B, T, HV, K]`.
    decay: Option<Tensor<4>>,
    /// `[B, T, HV, 1]`
    beta: Tensor<4>,
    /// `[B, HV, K, V]`
    state: Tensor<4>,
}

impl Arguments {
    /// Checks the arguments and runs the kernels where there are some, else the reference: `o`, and the state after the last
    /// token.
    pub(crate) fn run(mut self) -> Result<(Tensor<4>, Tensor<4>), OpError> {
        self.check()?;
        let [b, t, _, dk] = self.q.dims();
        let [.., heads, dv] = self.v.dims();
        let gate = self.options.decay_gate.take();
        self.gate = activated(self.op, self.gate, gate, self.options.sequence.engine)?;
        // Taken, not copied: a state that nobody else holds is updated in place.
        let sequence = std::mem::take(&mut self.options.sequence);
        let SequenceOptions { scale, initial_state, cu_seqlens, chunk, engine } = sequence;
        if let Some(packed) = &cu_seqlens {
            packed.check(b, t)?;
        }
        let n = cu_seqlens.as_ref().map_or(b, CuSeqlens::num_sequences);
        if let Some(state) = &initial_state {
            activation(self.op, "initial_state", state)?;
            same_shape(self.op, "initial_state", state, [n, heads, dk, dv], "[N, HV, K, V]")?;
            same_device(self.op, "initial_state", state, &self.q.device())?;
        }
        if chunk == Some(0) {
            let reason = "is 0, but a chunk has at least one token".into();
            return Err(OpError::Option { op: self.op, option: "chunk", reason });
        }
        let scale = scale.unwrap_or_else(|| (dk as f64).powf(-0.5));
        #[cfg(feature = "cube")]
        if crate::delta_walk::takes(&self.v, dk, t, engine) {
            let sequences = cu_seqlens.unwrap_or_else(|| CuSeqlens::dense(b, t));
            return Ok(self.on_kernels(scale, initial_state, sequences, chunk, engine));
        }
        #[cfg(not(feature = "cube"))]
        let _ = engine;
        let out = self.q.dtype();
        let dtype = compute_dtype(out);
        let state = match initial_state {
            Some(state) => state.cast(dtype),
            None => Tensor::zeros([n, heads, dk, dv], (&self.q.device(), dtype)),
        };
        if t == 0 {
            return Ok((self.v, state));
        }
        let operands = self.operands(state, dtype);
        let (o, state) = match cu_seqlens {
            None => operands.run(scale, chunk),
            Some(packed) => {
                let (o, states) = by_sequence(&packed, |piece| {
                    if piece.length == 0 {
                        return (None, piece.state(&operands.state));
                    }
                    let piece = Operands {
                        q: piece.tokens(&operands.q),
                        k: piece.tokens(&operands.k),
                        v: piece.tokens(&operands.v),
                        p: operands.p.as_ref().map(|p| piece.tokens(p)),
                        decay: operands.decay.as_ref().map(|g| piece.tokens(g)),
                        beta: piece.tokens(&operands.beta),
                        state: piece.state(&operands.state),
                    };
                    let (o, state) = piece.run(scale, chunk);
                    (Some(o), state)
                });
                (o.unwrap_or_else(|| operands.v.clone()), Tensor::cat(states, 0))
            }
        };
        Ok((o.cast(out), state))
    }

    fn check(&self) -> Result<(), OpError> {
        let op = self.op;
        let [b, t, h, dk] = self.q.dims();
        let [.., heads, dv] = self.v.dims();
        let (device, dtype) = (self.q.device(), self.q.dtype());
        activation(op, "q", &self.q)?;
        if [b, h, dk, heads, dv].contains(&0) {
            return Err(OpError::Shape {
                op,
                argument: if [b, h, dk].contains(&0) { "q" } else { "v" },
                found: if [b, h, dk].contains(&0) { self.q.dims() } else { self.v.dims() }.to_vec(),
                expected: "at least one row, head and channel".into(),
            });
        }
        if heads % h != 0 {
            return Err(OpError::Shape {
                op,
                argument: "v",
                found: self.v.dims().to_vec(),
                expected: format!("[B, T, HV, V] with a multiple of the {h} key heads for HV"),
            });
        }
        let operand = |name, x: &Tensor<4>, shape, letters| {
            same_shape(op, name, x, shape, letters)?;
            same_dtype(op, name, x, dtype)?;
            same_device(op, name, x, &device)
        };
        operand("k", &self.k, [b, t, h, dk], "[B, T, H, K]")?;
        operand("v", &self.v, [b, t, heads, dv], "[B, T, HV, V]")?;
        if let Some(p) = &self.p {
            operand("p", p, [b, t, h, dk], "[B, T, H, K]")?;
        }
        by_token(op, "beta", &self.beta, [b, t, heads], "[B, T, HV]", &device)?;
        match &self.gate {
            Some(Gate::Token(g)) => by_token(op, "log_decay", g, [b, t, heads], "[B, T, HV]", &device),
            Some(Gate::Key(g)) => by_token(op, "log_decay", g, [b, t, heads, dk], "[B, T, HV, K]", &device),
            None => Ok(()),
        }
    }

    #[cfg(feature = "cube")]
    fn on_kernels(
        self,
        scale: f64,
        state: Option<Tensor<4>>,
        sequences: CuSeqlens,
        chunk: Option<usize>,
        engine: Engine,
    ) -> (Tensor<4>, Tensor<4>) {
        use crate::delta_walk::{Form, Problem, run};
        #[cfg(feature = "cuda")]
        if self.p.is_none() && chunk.is_none() {
            let keys = self.q.dims()[3];
            if matches!(self.gate, Some(Gate::Key(_))) {
                if let Some(cores) = crate::hopper_dplr::takes(&self.v, keys, &sequences, engine) {
                    return self.on_tensor_cores_by_key(cores, scale, state, sequences);
                }
            } else if let Some(cores) = crate::hopper_delta::takes(&self.v, keys, &sequences, engine) {
                return self.on_tensor_cores(cores, scale, state, sequences);
            }
        }
        #[cfg(not(feature = "cuda"))]
        let _ = engine;
        // The norms are not rounded to bf16, as they are not in the reference.
        let normalised = |x: Tensor<4>| if self.options.l2_norm { l2_norm(x, l2_norm::EPS) } else { x };
        run(Problem {
            op: self.op,
            form: if self.p.is_some() { Form::Feedback } else { Form::Key },
            qkv: [normalised(self.q), normalised(self.k), self.v],
            a: self.p.map(normalised),
            strength: Some(self.beta.cast(DType::F32)),
            b: None,
            decay: self.gate,
            scale,
            state,
            sequences,
            chunk,
        })
    }

    #[cfg(feature = "cuda")]
    fn on_tensor_cores_by_key(
        self,
        cores: crate::hopper_walk::Cores,
        scale: f64,
        state: Option<Tensor<4>>,
        sequences: CuSeqlens,
    ) -> (Tensor<4>, Tensor<4>) {
        let Some(Gate::Key(log_decay)) = self.gate else { unreachable!("called with a decay by key") };
        // Operands of matrix units are bf16.
        let normalised = |x: Tensor<4>| if self.options.l2_norm { l2_norm::unchecked(x, l2_norm::EPS) } else { x };
        let (q, k) = (normalised(self.q), normalised(self.k));
        let vectors = crate::hopper_dplr::Vectors::Key(self.beta);
        let (op, v) = (self.op, self.v);
        crate::hopper_dplr::run(crate::hopper_dplr::Problem {
            op,
            cores,
            q,
            k,
            vectors,
            v,
            log_decay,
            scale,
            state,
            sequences,
        })
    }

    #[cfg(feature = "cuda")]
    fn on_tensor_cores(
        self,
        cores: crate::hopper_walk::Cores,
        scale: f64,
        state: Option<Tensor<4>>,
        sequences: CuSeqlens,
    ) -> (Tensor<4>, Tensor<4>) {
        // Operands of matrix units are bf16.
        let normalised = |x: Tensor<4>| if self.options.l2_norm { l2_norm::unchecked(x, l2_norm::EPS) } else { x };
        crate::hopper_delta::run(crate::hopper_delta::Problem {
            op: self.op,
            cores,
            q: normalised(self.q),
            k: normalised(self.k),
            v: self.v,
            beta: self.beta,
            decay: match self.gate {
                Some(Gate::Token(g)) => Some(g),
                _ => None,
            },
            scale,
            state,
            sequences,
        })
    }

    fn operands(self, state: Tensor<4>, dtype: DType) -> Operands {
        let [b, t, h, _] = self.q.dims();
        let heads = self.v.dims()[2];
        let by_key_head = |x: Tensor<4>| {
            let x = if self.options.l2_norm { l2_norm(x, l2_norm::EPS) } else { x.cast(dtype) };
            repeat_heads(x, heads / h)
        };
        let column = |x: Tensor<3>| x.cast(dtype).reshape([b, t, heads, 1]);
        Operands {
            q: by_key_head(self.q),
            k: by_key_head(self.k),
            v: self.v.cast(dtype),
            p: self.p.map(by_key_head),
            decay: self.gate.map(|gate| match gate {
                Gate::Token(g) => column(g),
                Gate::Key(g) => g.cast(dtype),
            }),
            beta: column(self.beta),
            state,
        }
    }
}

impl Operands {
    /// The outputs and the last state.
    fn run(self, scale: f64, chunk: Option<usize>) -> (Tensor<4>, Tensor<4>) {
        let tokens = self.q.dims()[1];
        let by_key = self.decay.as_ref().is_some_and(|g| g.dims()[3] > 1);
        match (tokens, chunk) {
            // A step of generation: the recurrence itself is the least work.
            (1, None) => reference::recurrent(self.q, self.k, self.v, self.p, self.decay, self.beta, scale, self.state),
            (_, Some(chunk)) => chunked::run(self, scale, chunk),
            // A short sequence does not pay for a long chunk.
            (_, None) => {
                let chunk = if by_key { CHUNK_KEY } else { CHUNK };
                chunked::run(self, scale, chunk.min(tokens.next_power_of_two()))
            }
        }
    }
}

/// The log decay of what `parameters` make of it, where there are some.
pub(crate) fn activated(
    op: &'static str,
    log_decay: Option<Gate>,
    parameters: Option<DecayGate>,
    engine: Engine,
) -> Result<Option<Gate>, OpError> {
    let Some(parameters) = parameters else { return Ok(log_decay) };
    Ok(Some(match log_decay {
        Some(Gate::Token(a)) => Gate::Token(decay_gate(a, parameters, engine)?),
        Some(Gate::Key(a)) => {
            let [b, t, heads, keys] = a.dims();
            let a = decay_gate(a.reshape([b, t, heads * keys]), parameters, engine)?;
            Gate::Key(a.reshape([b, t, heads, keys]))
        }
        None => {
            let reason = "is given to a rule without a decay; leave it out".into();
            return Err(OpError::Option { op, option: "decay_gate", reason });
        }
    }))
}

/// Checks a gate or a writing strength: its shape and device. Its dtype is free among those of activations.
fn by_token<const D: usize>(
    op: &'static str,
    name: &'static str,
    x: &Tensor<D>,
    shape: [usize; D],
    letters: &str,
    device: &Device,
) -> Result<(), OpError> {
    activation(op, name, x)?;
    same_shape(op, name, x, shape, letters)?;
    same_device(op, name, x, device)
}

/// `[B, T, H, D]` to `[B, T, H · times, D]`, each head in `times` contiguous copies.
fn repeat_heads(x: Tensor<4>, times: usize) -> Tensor<4> {
    if times == 1 {
        return x;
    }
    let [b, t, h, d] = x.dims();
    x.reshape([b, t, h, 1, d]).expand([b, t, h, times, d]).reshape([b, t, h * times, d])
}
