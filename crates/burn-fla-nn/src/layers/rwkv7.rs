//! RWKV7 (Goose).

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor, activation};
use burn_fla_ops::{self as ops, SequenceOptions};
use serde_json::Value;

use super::{SequenceContext, ShiftState};
use crate::models::{CommonConfig, Fields};
use crate::modules::{Between, GroupNorm, Linear, LowRank, lerp, merge_heads, split_heads};
use crate::{Init, NnError, ParamScope};

/// The log decay of a token lies between this, −e^{−½}, and 0.
const LOG_DECAY: f64 = -0.606_530_659_712_633_4;

/// Configuration of [`Rwkv7`].
#[derive(Config, Debug)]
pub struct Rwkv7Config {
    /// Width of the input and output.
    pub hidden_size: usize,
    /// Width K of a key head; there are `hidden_size` / K heads.
    #[config(default = "64")]
    pub head_dim: usize,
    /// H·V; `None`: `hidden_size`.
    pub value_dim: Option<usize>,
    /// Rank of the map to the log decays; `None`: from the widths.
    pub decay_low_rank_dim: Option<usize>,
    /// Rank of the map to the output gate; `None`: from the width.
    pub gate_low_rank_dim: Option<usize>,
    /// Rank of the map to the removal rates; `None`: from the widths.
    pub a_low_rank_dim: Option<usize>,
    /// Rank of the map to how much of the first layer's values is taken; `None`: from the widths.
    pub v_low_rank_dim: Option<usize>,
    /// Whether the length of the removal keys has its ε under the root, or is bounded below.
    #[config(default = "true")]
    pub fuse_norm: bool,
    /// ε of the norms around the layer; that of the output norm is K times it.
    #[config(default = "1e-5")]
    pub norm_eps: f64,
    /// Which layer this is, from 0. The first takes no values from another; all start differently.
    #[config(default = "0")]
    pub layer: usize,
    /// How many layers there are.
    #[config(default = "1")]
    pub num_layers: usize,
}

/// S_t = diag(e^{w_t}) S_{t−1} − (κ_t ∘ a_t) (κ_tᵀ S_{t−1}) + k_t v_tᵀ, o_t = S_tᵀ r_t: a delta rule whose decays, removal
/// keys κ and rates a depend on the input. Values are drawn towards those of the first layer; the output is normalised for
/// each head, gets back a part of the current value, and is gated (Peng et al. 2025).
#[derive(Module, Debug)]
pub struct Rwkv7 {
    /// `[1, 1, hidden]`: how far each feature is moved towards the token before, as r sees it.
    pub x_r: Param<Tensor<3>>,
    /// The same for w.
    pub x_w: Param<Tensor<3>>,
    /// The same for k.
    pub x_k: Param<Tensor<3>>,
    /// The same for v.
    pub x_v: Param<Tensor<3>>,
    /// The same for a.
    pub x_a: Param<Tensor<3>>,
    /// The same for g.
    pub x_g: Param<Tensor<3>>,
    /// `[hidden]`: κ is k ⊙ this, at length 1.
    pub k_k: Param<Tensor<1>>,
    /// `[hidden]`: how far k depends on a.
    pub k_a: Param<Tensor<1>>,
    /// `[H, K]`: the part of the current value that the output gets back.
    pub r_k: Param<Tensor<2>>,
    /// `[hidden, hidden]`
    pub r_proj: Linear,
    /// `[hidden, hidden]`
    pub k_proj: Linear,
    /// `[H·V, hidden]`
    pub v_proj: Linear,
    /// `[hidden, H·V]`
    pub o_proj: Linear,
    /// To the log decays.
    pub w_lora: LowRank,
    /// To how much of the first layer's values is taken; absent in the first layer.
    pub v_lora: Option<LowRank>,
    /// To the removal rates.
    pub a_lora: LowRank,
    /// To the output gate.
    pub g_lora: LowRank,
    /// `[H·V]`
    pub g_norm: GroupNorm,
    /// Number of heads H.
    pub num_heads: usize,
    /// Whether the length of the removal keys has its ε under the root.
    pub fuse_norm: bool,
}

impl Rwkv7Config {
    /// Reads the fields of a `config.json` for layer `layer`.
    pub(crate) fn from_fields(fields: &Fields<'_>, common: &CommonConfig, layer: usize) -> Result<Self, NnError> {
        let hidden = common.hidden_size;
        let heads = fields.optional_usize("num_heads")?;
        let head_dim = match heads {
            Some(heads) if fields.is_null("head_dim") => hidden / heads,
            _ => fields.usize("head_dim", 64)?,
        };
        if let Some(heads) = heads
            && heads * head_dim != hidden
        {
            return Err(fields.error(
                "num_heads",
                format!("{heads} heads of head_dim {head_dim} are not hidden_size {hidden}; head_dim alone is enough"),
            ));
        }
        let rank = |field: &str, default: usize| match fields.is_absent(field) {
            true => Ok(Some(default)),
            false => fields.optional_usize(field),
        };
        Ok(Self::new(hidden)
            .with_head_dim(head_dim)
            .with_value_dim(value_dim(fields, common, layer)?)
            .with_decay_low_rank_dim(rank("decay_low_rank_dim", 64)?)
            .with_gate_low_rank_dim(rank("gate_low_rank_dim", 128)?)
            .with_a_low_rank_dim(rank("a_low_rank_dim", 64)?)
            .with_v_low_rank_dim(rank("v_low_rank_dim", 16)?)
            .with_fuse_norm(common.fuse_norm)
            .with_norm_eps(common.norm_eps)
            .with_layer(layer)
            .with_num_layers(common.num_hidden_layers))
    }

    /// An error for values that no layer can be built from.
    pub(crate) fn check(&self) -> Result<(), NnError> {
        let (hidden, width) = (self.hidden_size, self.head_dim);
        if width == 0 || hidden == 0 || !hidden.is_multiple_of(width) {
            return Err(NnError::config(
                "head_dim",
                format!("hidden_size {hidden} must be a multiple of it, and it is {width}"),
            ));
        }
        let values = self.values();
        if values == 0 || !values.is_multiple_of(hidden) {
            return Err(NnError::config("value_dim", format!("{values} is not a multiple of hidden_size {hidden}")));
        }
        for (field, rank) in [
            ("decay_low_rank_dim", self.decay_low_rank_dim),
            ("gate_low_rank_dim", self.gate_low_rank_dim),
            ("a_low_rank_dim", self.a_low_rank_dim),
            ("v_low_rank_dim", self.v_low_rank_dim),
        ] {
            if rank == Some(0) {
                return Err(NnError::config(field, "must be at least 1, or null for one made of the widths"));
            }
        }
        Ok(())
    }

    /// H·V
    fn values(&self) -> usize {
        self.value_dim.unwrap_or(self.hidden_size)
    }

    /// `given`, or a multiple of 32 near `factor` · √hidden.
    fn rank(&self, given: Option<usize>, factor: f64) -> usize {
        given.unwrap_or_else(|| {
            // To even where it is halfway, as the format's own rule rounds.
            let multiple = (factor * (self.hidden_size as f64).sqrt() / 32.0).round_ties_even() as usize;
            (32 * multiple).max(32)
        })
    }

    /// A layer with the parameters of `scope`.
    ///
    /// # Errors
    /// A head width that does not divide `hidden_size`; `value_dim` that is not a multiple of it; a rank of 0.
    pub fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Rwkv7, NnError> {
        self.check()?;
        let (hidden, width, values) = (self.hidden_size, self.head_dim, self.values());
        let start = Start::new(self);
        let shift = |name: &str, row: usize, power: f64| {
            let value = |n: usize| 1.0 - (n as f64 / hidden as f64).powf(power * start.later);
            scope.start_or_row(name, [1, 1, hidden], &Init::Values(&value), "x_x", [row, 6])
        };
        let linear = |name, input, output, init: Init<'_>| Linear::start(&scope.at(name), input, output, &init, None);
        let low_rank = |name, rank, output, between, bias: Option<&dyn Fn(usize) -> f64>| {
            let bias = bias.map(Init::Values);
            LowRank::new(&scope.at(name), [hidden, rank, output], between, bias.as_ref())
        };
        // Wider heads get a higher rank.
        let wide = width as f64 / 64.0;
        let decay = |n| {
            let rise = start.place(n, hidden).powf(1.0 + start.earlier.powf(0.3));
            -6.0 + 6.0 * rise + 0.5 + 2.5 * start.zigzag(n)
        };
        let rate = |n| -0.19 + 0.3 * start.zigzag(n) + 0.4 * (start.place(n, hidden) - 0.5);
        let first = |n| 0.73 - 0.4 * (start.place(n, values) - 0.5);
        let removal = |n| 0.71 - 0.1 * (start.place(n, hidden) - 0.5);
        Ok(Rwkv7 {
            x_r: shift("x_r", 0, 0.2),
            x_w: shift("x_w", 1, 0.9),
            x_k: shift("x_k", 2, 0.7),
            x_v: shift("x_v", 3, 0.7),
            x_a: shift("x_a", 4, 0.9),
            x_g: shift("x_g", 5, 0.2),
            k_k: scope.start("k_k", [hidden], &Init::Values(&removal)),
            k_a: scope.start("k_a", [hidden], &Init::Constant(1.02)),
            r_k: scope.start("r_k", [hidden / width, width], &Init::Constant(-0.04)),
            r_proj: linear("r_proj", hidden, hidden, Init::Orthogonal(1.0)),
            k_proj: linear("k_proj", hidden, hidden, Init::Orthogonal(0.1)),
            v_proj: linear("v_proj", hidden, values, Init::Orthogonal(1.0)),
            o_proj: linear("o_proj", values, hidden, Init::Constant(0.0)),
            w_lora: low_rank(
                "w_lora",
                self.rank(self.decay_low_rank_dim, 2.5 * wide),
                hidden,
                Between::Tanh,
                Some(&decay),
            ),
            v_lora: (self.layer > 0).then(|| {
                low_rank("v_lora", self.rank(self.v_low_rank_dim, 1.7 * wide), values, Between::Nothing, Some(&first))
            }),
            a_lora: low_rank(
                "a_lora",
                self.rank(self.a_low_rank_dim, 2.5 * wide),
                hidden,
                Between::Nothing,
                Some(&rate),
            ),
            g_lora: low_rank("g_lora", self.rank(self.gate_low_rank_dim, 5.0), values, Between::Sigmoid, None),
            g_norm: GroupNorm::start(
                &scope.at("g_norm"),
                values,
                ((self.layer + 1) as f64 / self.num_layers.max(1) as f64).powf(0.7),
                true,
                width as f64 * self.norm_eps,
            ),
            num_heads: hidden / width,
            fuse_norm: self.fuse_norm,
        })
    }
}

/// The field `value_dim`: one number, or a list of one for each layer.
fn value_dim(fields: &Fields<'_>, common: &CommonConfig, layer: usize) -> Result<Option<usize>, NnError> {
    if !fields.get("value_dim").is_some_and(Value::is_array) {
        return fields.optional_usize("value_dim");
    }
    let list = fields.list("value_dim")?;
    if list.len() != common.num_hidden_layers {
        return Err(fields.error(
            "value_dim",
            format!("the list has {} entries, for {} layers", list.len(), common.num_hidden_layers),
        ));
    }
    // The values of all layers are mixed with those of the first.
    if let Some(other) = list.iter().find(|width| **width != list[0]) {
        return Err(fields.error("value_dim", format!("layers cannot have {} and {other}: they are mixed", list[0])));
    }
    Ok(Some(list[layer]))
}

/// How the place of a layer and of a feature decide what it starts from.
struct Start {
    head_dim: usize,
    /// From 0 in the first layer to 1 in the last.
    earlier: f64,
    /// From 1 in the first layer to nearly 0 in the last.
    later: f64,
}

impl Start {
    fn new(config: &Rwkv7Config) -> Self {
        let (layer, layers) = (config.layer as f64, config.num_layers as f64);
        // A single layer is the first.
        let earlier = if config.num_layers > 1 { layer / (layers - 1.0) } else { 0.0 };
        Self { head_dim: config.head_dim, earlier, later: 1.0 - layer / layers.max(1.0) }
    }

    /// From 0 in the first feature to 1 in the last.
    fn place(&self, n: usize, width: usize) -> f64 {
        n as f64 / (width.max(2) - 1) as f64
    }

    /// y |y| with y from −1 to 1 over the features of each head.
    fn zigzag(&self, n: usize) -> f64 {
        if self.head_dim < 2 {
            return 0.0;
        }
        let half = (self.head_dim - 1) as f64 / 2.0;
        let y = ((n % self.head_dim) as f64 - half) / half;
        y * y.abs()
    }
}

impl Rwkv7 {
    /// The mixed sequence, and the state to go on from when the context keeps states.
    ///
    /// # Shapes
    /// - `x` and the output `[B, T, hidden]`
    ///
    /// # Errors
    /// Shapes that do not fit; a first layer with values of another width.
    pub fn forward(
        &self,
        x: Tensor<3>,
        past: Option<ShiftState>,
        context: &SequenceContext,
    ) -> Result<(Tensor<3>, Option<ShiftState>), NnError> {
        context.check_input(&x, self.r_proj.weight.dims()[1])?;
        let dtype = x.dtype();
        let (state, last) = past.map_or((None, None), |past| (Some(past.state), Some(past.last)));
        let (delta, last) = context.token_shift(x.clone(), last)?;
        let seen_by = |part: &Param<Tensor<3>>| lerp(&x, &delta, part.val());
        let heads = |x| split_heads(x, self.num_heads);

        let r = heads(self.r_proj.forward(seen_by(&self.x_r))?);
        let log_decay = sigmoid(self.w_lora.forward(seen_by(&self.x_w))?).mul_scalar(LOG_DECAY);
        let k = self.k_proj.forward(seen_by(&self.x_k))?.cast(DType::F32);
        let v = heads(self.values(seen_by(&self.x_v), context)?);
        let a = sigmoid(self.a_lora.forward(seen_by(&self.x_a))?);
        let gate = heads(self.g_lora.forward(seen_by(&self.x_g))?);

        let removal = self.unit(heads(k.clone() * self.k_k.val().unsqueeze()))?.cast(dtype);
        let k = k * ((a.clone() - 1.0) * self.k_a.val().unsqueeze() + 1.0);
        let (k, a) = (heads(k).cast(dtype), heads(a).cast(dtype));
        let options = SequenceOptions { scale: Some(1.0), ..context.options(state) };
        let (o, state) = ops::rwkv7(r.clone(), heads(log_decay), k.clone(), v.clone(), removal, a, options)?;

        let o = self.g_norm.forward(o)?.cast(DType::F32);
        let back = r.cast(DType::F32) * k.cast(DType::F32) * self.r_k.val().unsqueeze();
        let o = (o + back.sum_dim(3) * v.cast(DType::F32)) * gate.cast(DType::F32);
        let y = self.o_proj.forward(merge_heads(o.cast(dtype)))?;
        Ok((y, context.keep_state().then_some(ShiftState { state, last })))
    }

    /// v, drawn towards the values of the first layer of this kind.
    fn values(&self, x: Tensor<3>, context: &SequenceContext) -> Result<Tensor<3>, NnError> {
        let v = self.v_proj.forward(x.clone())?;
        let (Some(first), Some(v_lora)) = (context.first_values(&v), &self.v_lora) else {
            return Ok(v);
        };
        if first.dims() != v.dims() {
            return Err(NnError::config(
                "value_dim",
                format!(
                    "a layer has values of width {}, but the first has {}, and they are mixed",
                    v.dims()[2],
                    first.dims()[2]
                ),
            ));
        }
        let part = sigmoid(v_lora.forward(x)?).cast(v.dtype());
        Ok(v.clone() + (first - v) * part)
    }

    /// Each head at length 1.
    fn unit(&self, x: Tensor<4>) -> Result<Tensor<4>, NnError> {
        if self.fuse_norm {
            return Ok(ops::l2_norm(x, ops::l2_norm::EPS)?);
        }
        let square = x.clone().square().sum_dim(3);
        Ok(x / square.clamp_min(1e-24).sqrt())
    }
}

/// σ(x) in f32.
fn sigmoid(x: Tensor<3>) -> Tensor<3> {
    activation::sigmoid(x.cast(DType::F32))
}
