//! THE list of mixers: each with its layer, its configuration and its state, and what every one of them has besides.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::*;
use crate::{ParamScope, ParamSource};

/// Makes the enums over all mixers from one line each.
macro_rules! mixers {
    ($($(#[$doc:meta])* $name:ident: $layer:ident, $config:ident, $state:ident;)*) => {
        /// Configuration of a [`Mixer`]: which token mixer a layer has.
        #[derive(Clone, Debug)]
        pub enum MixerConfig {
            $($(#[$doc])* $name($config),)*
        }

        /// The token mixer of a layer.
        // A model has a few dozen of them, beside gigabytes of weights: no box is needed around the larger ones.
        #[allow(clippy::large_enum_variant)]
        #[derive(Module, Debug)]
        pub enum Mixer {
            $($(#[$doc])* $name($layer),)*
        }

        /// What the mixer of a layer keeps of the tokens it has seen.
        // A handful of handles a layer.
        #[allow(clippy::large_enum_variant)]
        #[derive(Clone, Debug)]
        pub enum LayerState {
            $($(#[$doc])* $name($state),)*
        }

        $(impl $config {
            /// A layer with weights drawn from `seed`, for use outside a [`CausalLm`](crate::CausalLm).
            ///
            /// # Errors
            /// As [`build`](Self::build).
            pub fn init(&self, seed: u64, device: &Device) -> Result<$layer, NnError> {
                self.build(&ParamSource::seeded(seed, 0.02, device).root())
            }
        })*

        impl MixerConfig {
            /// An error for values that no layer can be built from.
            pub(crate) fn check(&self) -> Result<(), NnError> {
                match self { $(Self::$name(config) => config.check().map(drop),)* }
            }

            pub(crate) fn build(&self, scope: &ParamScope<'_, '_>) -> Result<Mixer, NnError> {
                Ok(match self { $(Self::$name(config) => Mixer::$name(config.build(scope)?),)* })
            }
        }

        impl Mixer {
            /// The mixed sequence, and what to go on from when the context keeps states.
            ///
            /// # Shapes
            /// - `x` and the output `[B, T, hidden]`
            ///
            /// # Errors
            /// A state of another kind of layer; shapes that do not fit.
            pub fn forward(
                &self,
                x: Tensor<3>,
                past: Option<LayerState>,
                context: &SequenceContext,
            ) -> Result<(Tensor<3>, Option<LayerState>), NnError> {
                match self {
                    $(Self::$name(layer) => {
                        let past = match past {
                            None => None,
                            Some(LayerState::$name(state)) => Some(state),
                            Some(other) => return Err(other.is_not(stringify!($name))),
                        };
                        let (y, state) = layer.forward(x, past, context)?;
                        Ok((y, state.map(LayerState::$name)))
                    })*
                }
            }
        }

        impl LayerState {
            /// How many numbers it holds.
            pub fn elements(&self) -> usize {
                match self { $(Self::$name(state) => state.elements(),)* }
            }

            fn is_not(&self, expected: &str) -> NnError {
                let found = match self { $(Self::$name(_) => stringify!($name),)* };
                NnError::argument("state", format!("it is of a layer of kind {found}, and the layer is {expected}"))
            }
        }
    };
}

mixers! {
    /// Attention with bounded-memory control.
    Abc: Abc, AbcConfig, AbcLayerState;
    /// Softmax attention.
    Attention: Attention, AttentionConfig, KeyValueState;
    /// Linear attention with a Taylor kernel.
    Based: Based, BasedConfig, RecurrentState;
    /// Gated delta rule with feedback.
    Comba: Comba, CombaConfig, RecurrentState;
    /// Delta rule.
    DeltaNet: DeltaNet, DeltaNetConfig, RecurrentState;
    /// Softmax attention that forgets.
    ForgettingAttention: ForgettingAttention, ForgettingAttentionConfig, ForgettingState;
    /// Gated delta rule.
    GatedDeltaNet: GatedDeltaNet, GatedDeltaNetConfig, RecurrentState;
    /// Several steps of the delta rule a token.
    GatedDeltaProduct: GatedDeltaProduct, GatedDeltaProductConfig, RecurrentState;
    /// Gated linear attention.
    Gla: Gla, GlaConfig, RecurrentState;
    /// Gated slot attention.
    Gsa: Gsa, GsaConfig, GsaLayerState;
    /// Gated recurrence over outer products.
    Hgrn2: Hgrn2, Hgrn2Config, RecurrentState;
    /// Element-wise gated recurrence.
    Hgrn: Hgrn, HgrnConfig, HgrnState;
    /// Gated delta rule with a decay by key.
    Kda: Kda, KdaConfig, RecurrentState;
    /// Multi-head latent attention.
    LatentAttention: LatentAttention, LatentAttentionConfig, KeyValueState;
    /// Linear attention to running means.
    LightNet: LightNet, LightNetConfig, LightNetState;
    /// Linear attention with feature maps.
    LinearAttention: LinearAttention, LinearAttentionConfig, RecurrentState;
    /// State space duality.
    Mamba2: Mamba2, Mamba2Config, RecurrentState;
    /// Selective state space.
    Mamba: Mamba, MambaConfig, MambaState;
    /// Linear attention to the solution of a ridge regression.
    MesaNet: MesaNet, MesaNetConfig, MesaLayerState;
    /// Native sparse attention.
    NativeSparseAttention: NativeSparseAttention, NativeSparseAttentionConfig, KeyValueState;
    /// Softmax attention with accumulated reflections.
    PathAttention: PathAttention, PathAttentionConfig, PathAttentionState;
    /// Linear attention with a quadratic kernel.
    Rebased: Rebased, RebasedConfig, RecurrentState;
    /// Multi-scale retention.
    Retention: Retention, RetentionConfig, RecurrentState;
    /// RWKV6.
    Rwkv6: Rwkv6, Rwkv6Config, ShiftState;
    /// RWKV7.
    Rwkv7: Rwkv7, Rwkv7Config, ShiftState;
}

impl MixerConfig {
    /// The width of the lower bounds of the forget gates, for the mixers that have a row in the model's
    /// `lower_bounds`.
    pub(crate) fn lower_bounds(&self) -> Option<usize> {
        match self {
            Self::Hgrn(config) if config.use_lower_bound => Some(config.hidden_size),
            Self::Hgrn2(config) if config.use_lower_bound => Some(config.hidden_size),
            _ => None,
        }
    }
}
