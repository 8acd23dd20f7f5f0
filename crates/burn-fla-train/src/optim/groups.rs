//! Which parameter gets which learning rate and weight decay.

use regex::Regex;

use crate::TrainError;
use crate::recipe::OptimizerSection;

/// What AdamW needs to know about one parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParamRule {
    /// Multiplies the learning rate.
    pub lr_scale: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The rules of a recipe, ready to be asked.
#[derive(Clone, Debug)]
pub struct ParamRules {
    groups: Vec<(Regex, f64, Option<f64>)>,
    weight_decay: f64,
}

impl ParamRules {
    /// Compiles the patterns of a recipe.
    ///
    /// # Errors
    /// A pattern that is no regular expression (a loaded recipe has none).
    pub fn new(section: &OptimizerSection) -> Result<ParamRules, TrainError> {
        let compile = |rule: &crate::recipe::GroupRule| {
            let pattern = Regex::new(&rule.pattern).map_err(|error| TrainError::BadValue {
                at: "recipe".to_string(),
                key: "optimizer.groups.match".to_string(),
                message: error.to_string(),
            })?;
            Ok((pattern, rule.lr_scale, rule.weight_decay))
        };
        Ok(ParamRules {
            groups: section.groups.iter().map(compile).collect::<Result<_, TrainError>>()?,
            weight_decay: section.weight_decay,
        })
    }

    /// The rule of a parameter: the first group that matches its name, else the defaults, which spare 1-D parameters
    /// and the recurrences' own (`A_log`, `dt_bias`, `D`) from weight decay.
    pub fn of(&self, name: &str, rank: usize) -> ParamRule {
        let last = name.rsplit('.').next().unwrap_or(name);
        let spared = rank < 2 || matches!(last, "A_log" | "dt_bias" | "D");
        let default = if spared { 0.0 } else { self.weight_decay };
        match self.groups.iter().find(|(pattern, ..)| pattern.is_match(name)) {
            Some((_, lr_scale, weight_decay)) => {
                ParamRule { lr_scale: *lr_scale, weight_decay: weight_decay.unwrap_or(default) }
            }
            None => ParamRule { lr_scale: 1.0, weight_decay: default },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{GroupRule, OptimizerName};

    #[test]
    fn first_match_counts_and_vectors_are_spared() {
        let rule =
            |pattern: &str, lr_scale, weight_decay| GroupRule { pattern: pattern.to_string(), lr_scale, weight_decay };
        let rules = ParamRules::new(&OptimizerSection {
            name: OptimizerName::Adamw,
            lr: 1.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            momentum: None,
            ns_steps: None,
            groups: vec![rule("embed", 0.5, None), rule("bias$", 1.0, Some(0.2)), rule("emb", 9.0, None)],
        })
        .unwrap();
        let is = |name: &str, rank, lr_scale, weight_decay| {
            assert_eq!(rules.of(name, rank), ParamRule { lr_scale, weight_decay }, "{name}");
        };
        is("model.embeddings.weight", 2, 0.5, 0.1);
        is("model.layers.0.attn.q_proj.bias", 1, 1.0, 0.2);
        is("model.layers.0.attn.q_proj.weight", 2, 1.0, 0.1);
        is("model.norm.weight", 1, 1.0, 0.0);
        is("model.layers.0.attn.A_log", 2, 1.0, 0.0);
        is("model.layers.0.attn.dt_bias", 1, 1.0, 0.2);
    }
}
