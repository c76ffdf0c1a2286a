//! The rotary embeddings that a `config.json` describes.

use serde_json::Value;

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Scaling of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Context extension of the rotary frequencies, by Transformers' `rope_type`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// `default`: no scaling.
    None,
    /// `linear`: every frequency is divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// `llama3`: low frequencies are divided by `factor`, high frequencies are kept, and a ramp is
    /// between them (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies with wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Frequencies with wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of the original model.
        original_max_position_embeddings: f64,
    },
    /// `yarn` (arXiv 2309.00071): frequencies that turn fewer than `beta_slow` times within the
    /// original context are divided by `factor`, those that turn more than `beta_fast` times are
    /// kept, and a ramp is between them.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Context length of the original model.
        original_max_position_embeddings: f64,
        /// Turns above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is divided.
        beta_slow: f64,
        /// Factor of queries and keys.
        attention_factor: f64,
    },
}

/// The parameters of one or more rotary embeddings, and their name in messages.
pub(super) struct RopeParameters<'a> {
    field: String,
    /// `Null`: no scaling.
    parameters: &'a Value,
    /// `rope_theta` outside the parameters, where Transformers 4 writes it.
    theta: Option<&'a Value>,
    max_position_embeddings: f64,
}

fn given<'a>(json: &'a Value, key: &str) -> Option<&'a Value> {
    json.get(key).filter(|value| !value.is_null())
}

impl<'a> RopeParameters<'a> {
    /// The parameters in `config.json`: `rope_parameters` (Transformers 5), or `rope_theta` and
    /// `rope_scaling` (Transformers 4).
    pub(super) fn of_model(json: &'a Value, max_position_embeddings: usize) -> Self {
        let max_position_embeddings = max_position_embeddings as f64;
        let (field, parameters) = match given(json, "rope_parameters") {
            Some(parameters) => ("rope_parameters", parameters),
            None => ("rope_scaling", given(json, "rope_scaling").unwrap_or(&Value::Null)),
        };
        Self { field: field.into(), parameters, theta: given(json, "rope_theta"), max_position_embeddings }
    }

    /// The parameters of the blocks of one type, such as `sliding_attention`. Transformers 5 has
    /// them in `rope_parameters`; Transformers 4 has only the base, in the field `theta`, and
    /// scales full attention alone.
    ///
    /// # Errors
    /// `rope_parameters` has no parameters for this type.
    pub(super) fn of_layers(
        json: &'a Value,
        layer_type: &str,
        theta: &str,
        max_position_embeddings: usize,
    ) -> Result<Self, String> {
        let (theta, max_position_embeddings) = (given(json, theta), max_position_embeddings as f64);
        let Some(by_type) = given(json, "rope_parameters") else {
            let scaling = given(json, "rope_scaling").filter(|_| layer_type == "full_attention");
            let parameters = scaling.unwrap_or(&Value::Null);
            return Ok(Self { field: "rope_scaling".into(), parameters, theta, max_position_embeddings });
        };
        let Some(parameters) = given(by_type, layer_type) else {
            return Err(format!("rope_parameters.{layer_type}: is missing"));
        };
        let field = format!("rope_parameters.{layer_type}");
        Ok(Self { field, parameters, theta, max_position_embeddings })
    }

    /// Reads the rotary embedding. `default_theta` is the base if there is none.
    pub(super) fn read(&self, default_theta: f64) -> Result<Rope, String> {
        let Self { field, parameters, theta, .. } = self;
        if ["full_attention", "sliding_attention"].iter().any(|kind| parameters.get(kind).is_some()) {
            return Err(format!("{field}: this architecture has one rotary embedding for all blocks"));
        }
        let partial = given(parameters, "partial_rotary_factor");
        if partial.is_some_and(|partial| partial.as_f64() != Some(1.0)) {
            return Err(format!(
                "{field}.partial_rotary_factor: must be 1; rotary embeddings of a part of a head are not \
                 supported"
            ));
        }
        let positive = |value: &Value| value.as_f64().filter(|v| v.is_finite() && *v > 0.0);
        let number = |key: &str| {
            let value = parameters.get(key).and_then(positive);
            value.ok_or(format!("{field}.{key}: must be a positive number"))
        };
        let theta = match given(parameters, "rope_theta").or(*theta) {
            None => default_theta,
            Some(theta) => positive(theta).ok_or("rope_theta: must be a positive number")?,
        };
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        let scaling = match kind.unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            "yarn" => self.yarn(&number)?,
            other => {
                return Err(format!(
                    "{field}.rope_type: {other:?} is not supported; supported: default, linear, llama3, yarn"
                ));
            }
        };
        Ok(Rope { theta, scaling })
    }

    fn yarn(&self, number: &impl Fn(&str) -> Result<f64, String>) -> Result<RopeScaling, String> {
        let Self { field, parameters, max_position_embeddings, .. } = self;
        if parameters.get("truncate").is_some_and(|truncate| *truncate != Value::Bool(true)) {
            return Err(format!("{field}.truncate: must be true; a ramp of other bounds is not supported"));
        }
        let optional = |key: &str| given(parameters, key).map(|_| number(key)).transpose();
        let original = optional("original_max_position_embeddings")?.unwrap_or(*max_position_embeddings);
        let factor = optional("factor")?.unwrap_or(max_position_embeddings / original);
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let attention_factor = match optional("attention_factor")? {
            Some(given) => given,
            None => match (optional("mscale")?, optional("mscale_all_dim")?) {
                (Some(scale), Some(of_all)) => magnitude(scale) / magnitude(of_all),
                _ => magnitude(1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast: optional("beta_fast")?.unwrap_or(32.0),
            beta_slow: optional("beta_slow")?.unwrap_or(1.0),
            attention_factor,
        })
    }
}
