//! What the parts of a model are called in the Hugging Face format.

/// The names of the parts around the mixers, where they differ between architectures. Inside a part the fields of our
/// modules have the format's names themselves.
#[derive(Debug, PartialEq, Eq)]
pub struct Names {
    /// The backbone: `model` or `backbone`.
    pub model: &'static str,
    /// The norm before a layer's mixer.
    pub attn_norm: &'static str,
    /// The mixer.
    pub attn: &'static str,
    /// The norm before a layer's feed-forward network.
    pub mlp_norm: &'static str,
    /// The feed-forward network.
    pub mlp: &'static str,
    /// The norm after the last layer.
    pub norm: &'static str,
}

impl Names {
    /// The names of most architectures.
    pub const COMMON: Names =
        Names { model: "model", attn_norm: "attn_norm", attn: "attn", mlp_norm: "mlp_norm", mlp: "mlp", norm: "norm" };

    /// The names of RWKV.
    pub const RWKV: Names = Names { mlp_norm: "ffn_norm", mlp: "ffn", ..Self::COMMON };

    /// The dotted name of the parameter at these fields of a [`CausalLm`](crate::CausalLm).
    pub(crate) fn of(&self, segments: &[String]) -> String {
        let inside = segments.first().is_some_and(|first| first == "model");
        let in_layer = inside && segments.get(1).is_some_and(|second| second == "layers");
        let mut name = String::new();
        for (depth, segment) in segments.iter().enumerate() {
            let renamed = match (depth, segment.as_str()) {
                (0, "model") => self.model,
                (1, "norm") if inside => self.norm,
                (3, "attn_norm") if in_layer => self.attn_norm,
                (3, "attn") if in_layer => self.attn,
                (3, "mlp_norm") if in_layer => self.mlp_norm,
                (3, "mlp") if in_layer => self.mlp,
                (_, other) => other,
            };
            if depth > 0 {
                name.push('.');
            }
            name.push_str(renamed);
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_places_that_differ_are_renamed() {
        let names = Names { model: "backbone", attn: "mixer", attn_norm: "norm", norm: "norm_f", ..Names::COMMON };
        let of = |path: &str| names.of(&path.split('.').map(String::from).collect::<Vec<_>>());
        assert_eq!(of("model.layers.0.attn.norm.weight"), "backbone.layers.0.mixer.norm.weight");
        assert_eq!(of("model.layers.0.attn_norm.weight"), "backbone.layers.0.norm.weight");
        assert_eq!(of("model.norm.weight"), "backbone.norm_f.weight");
        assert_eq!(of("model.embeddings.weight"), "backbone.embeddings.weight");
        assert_eq!(of("lm_head.weight"), "lm_head.weight");
    }
}
