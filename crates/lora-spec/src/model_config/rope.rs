//! The rotary embeddings that a `config.json` describes.

use std::borrow::Cow;

use serde_json::Value;

use super::{Architecture, ModelConfig};

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// Number of features of a head.
    pub head_dim: usize,
    /// Number of features of a head that are rotated, the first ones; even.
    pub rotary_dim: usize,
    /// Whether the features of a pair are adjacent: features `2 i` and `2 i + 1`. Otherwise they
    /// are features `i` and `i + rotary_dim / 2`.
    pub is_interleaved: bool,
    /// Scaling of the frequencies for longer contexts.
    pub scaling: RopeScaling,
    /// Scaling of the rotated vectors by their position.
    pub position_scaling: Option<PositionScaling>,
}

/// Scaling of queries by their position `p` (Llama 4): the factor is
/// `1 + beta ln(1 + floor(p / original_max_position_embeddings))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionScaling {
    /// `llama_4_scaling_beta`.
    pub beta: f64,
    /// Context length of the original model.
    pub original_max_position_embeddings: f64,
}

/// Context extension of the rotary frequencies, by Transformers' `rope_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `default`: no scaling.
    None,
    /// `dynamic`: for sequences of more than `max_position_embeddings` positions, the base grows
    /// with the length of the sequence.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Length of the longest sequence without scaling.
        max_position_embeddings: f64,
    },
    /// `longrope` (arXiv 2402.13753): every frequency has a divisor of its own, and other divisors
    /// in sequences of more than `original_max_position_embeddings` positions.
    LongRope {
        /// Divisors of the frequencies in short sequences.
        short_factor: Vec<f64>,
        /// Divisors of the frequencies in long sequences.
        long_factor: Vec<f64>,
        /// Context length of the original model.
        original_max_position_embeddings: f64,
        /// Factor of queries and keys.
        attention_factor: f64,
    },
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
    /// `proportional`: the frequencies of the first pairs are divided by `factor`, the other pairs
    /// are not rotated (Gemma 4).
    Proportional {
        /// Divisor.
        factor: f64,
        /// Number of pairs of features that are rotated.
        rotated_pairs: usize,
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

impl Rope {
    /// Creates an embedding of all features of a head, without scaling.
    pub fn new(theta: f64, head_dim: usize) -> Self {
        Self {
            theta,
            head_dim,
            rotary_dim: head_dim,
            is_interleaved: false,
            scaling: RopeScaling::None,
            position_scaling: None,
        }
    }

    /// Returns what the frequencies depend on besides the settings: for sequences of `positions`
    /// positions with the same value they are the same.
    pub fn context(&self, positions: usize) -> usize {
        let positions_above = |limit: f64| if positions as f64 > limit { positions } else { 0 };
        match self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => positions_above(max_position_embeddings),
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                positions_above(original_max_position_embeddings)
                    .min(original_max_position_embeddings as usize + 1)
            }
            _ => 0,
        }
    }
}

/// The parameters of one or more rotary embeddings, and their name in messages.
pub(super) struct RopeParameters<'a> {
    field: String,
    head_dim: usize,
    is_phi3: bool,
    /// `Null`: no scaling.
    parameters: Cow<'a, Value>,
    /// `rope_theta` outside the parameters, where Transformers 4 writes it.
    theta: Option<&'a Value>,
    /// `partial_rotary_factor` outside the parameters.
    partial: Option<&'a Value>,
    /// `original_max_position_embeddings` outside the parameters, which has priority.
    original: Option<&'a Value>,
    max_position_embeddings: f64,
}

fn given<'a>(json: &'a Value, key: &str) -> Option<&'a Value> {
    json.get(key).filter(|value| !value.is_null())
}

/// Returns `rope_scaling`. Transformers ignores it if it is empty.
fn rope_scaling(json: &Value) -> Option<&Value> {
    given(json, "rope_scaling").filter(|scaling| scaling.as_object().is_none_or(|fields| !fields.is_empty()))
}

impl<'a> RopeParameters<'a> {
    /// The parameters in `config.json`: `rope_parameters` (Transformers 5), or `rope_theta` and
    /// `rope_scaling` (Transformers 4). If both are given, Transformers uses `rope_scaling` alone.
    pub(super) fn of_model(json: &'a Value, config: &ModelConfig, head_dim: usize) -> Self {
        let (field, parameters) = match (rope_scaling(json), given(json, "rope_parameters")) {
            (None, Some(parameters)) => ("rope_parameters", parameters),
            (scaling, _) => ("rope_scaling", scaling.unwrap_or(&Value::Null)),
        };
        Self::new(json, config, head_dim, field.into(), Cow::Borrowed(parameters), "rope_theta")
    }

    /// The parameters of the blocks of one type, such as `sliding_attention`. Transformers 5 has
    /// them in `rope_parameters`; Transformers 4 has only the base, in the field `theta`, and
    /// scales full attention alone. If both are given, `rope_scaling` replaces single parameters of
    /// full attention. An `original_max_position_embeddings` outside has no effect.
    ///
    /// # Errors
    /// `rope_parameters` has no parameters for this type, or a scaling has only `type`, the name
    /// before `rope_type`, which Transformers 5 does not read here.
    pub(super) fn of_layers(
        json: &'a Value,
        config: &ModelConfig,
        head_dim: usize,
        layer_type: &str,
        theta: &str,
    ) -> Result<Self, String> {
        let scaling = rope_scaling(json).filter(|_| layer_type == "full_attention");
        let Some(by_type) = given(json, "rope_parameters") else {
            let parameters = Cow::Borrowed(scaling.unwrap_or(&Value::Null));
            return Self::new(json, config, head_dim, "rope_scaling".into(), parameters, theta)
                .of_layer_type();
        };
        let field = format!("rope_parameters.{layer_type}");
        let Some(parameters) = given(by_type, layer_type) else {
            return Err(format!("{field}: is missing"));
        };
        let parameters = match (parameters, scaling) {
            (Value::Object(parameters), Some(Value::Object(scaling))) => {
                let replaced = parameters.clone().into_iter().chain(scaling.clone());
                Cow::Owned(Value::Object(replaced.collect()))
            }
            (_, Some(_)) => return Err("rope_scaling: must be a JSON object".into()),
            (parameters, None) => Cow::Borrowed(parameters),
        };
        Self::new(json, config, head_dim, field, parameters, theta).of_layer_type()
    }

    /// Applies the differences of parameters by type of block.
    fn of_layer_type(self) -> Result<Self, String> {
        let Self { field, parameters, .. } = &self;
        if given(parameters, "type").is_some() && given(parameters, "rope_type").is_none() {
            return Err(format!("{field}.type: Transformers 5 does not read it here; name it rope_type"));
        }
        Ok(Self { original: None, ..self })
    }

    fn new(
        json: &'a Value,
        config: &ModelConfig,
        head_dim: usize,
        field: String,
        parameters: Cow<'a, Value>,
        theta: &str,
    ) -> Self {
        Self {
            field,
            head_dim,
            is_phi3: config.architecture == Architecture::Phi3,
            parameters,
            theta: given(json, theta),
            partial: given(json, "partial_rotary_factor"),
            original: given(json, "original_max_position_embeddings"),
            max_position_embeddings: config.max_position_embeddings as f64,
        }
    }

    /// Reads the rotary embedding. `default_theta` is the base if there is none.
    pub(super) fn read(&self, default_theta: f64) -> Result<Rope, String> {
        let Self { field, parameters, theta, .. } = self;
        if !parameters.is_null() && !parameters.is_object() {
            return Err(format!("{field}: must be a JSON object"));
        }
        if ["full_attention", "sliding_attention"].iter().any(|kind| parameters.get(kind).is_some()) {
            return Err(format!("{field}: this architecture has one rotary embedding for all blocks"));
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
        let kind = given(parameters, "rope_type").or_else(|| given(parameters, "type"));
        let kind = kind.map_or(Some("default"), Value::as_str);
        let kind = kind.ok_or(format!("{field}.rope_type: must be a text"))?;
        let is_proportional = kind == "proportional" && !self.is_phi3;
        let rotary_dim = if is_proportional { self.head_dim } else { self.rotary_dim()? };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "longrope" => self.longrope(&number, rotary_dim / 2)?,
            // The names that Phi 3 used before.
            "su" | "yarn" if self.is_phi3 => self.longrope(&number, rotary_dim / 2)?,
            other if self.is_phi3 => {
                return Err(format!(
                    "{field}.rope_type: {other:?} is not supported for Phi 3; supported: default, longrope"
                ));
            }
            "dynamic" => RopeScaling::Dynamic {
                factor: number("factor")?,
                max_position_embeddings: self.max_position_embeddings,
            },
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "proportional" => RopeScaling::Proportional {
                factor: given(parameters, "factor").map_or(Ok(1.0), |_| number("factor"))?,
                rotated_pairs: (self.partial_rotary_factor()? * self.head_dim as f64 / 2.0) as usize,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: self
                    .original(&number)?
                    .unwrap_or(self.max_position_embeddings),
            },
            "yarn" if theta <= 1.0 => return Err("rope_theta: must be above 1 for yarn".into()),
            "yarn" => self.yarn(&number)?,
            other => {
                return Err(format!(
                    "{field}.rope_type: {other:?} is not supported; supported: default, linear, dynamic, \
                     llama3, yarn, longrope, proportional"
                ));
            }
        };
        Ok(Rope { rotary_dim, scaling, ..Rope::new(theta, self.head_dim) })
    }

    /// Reads the scaling of queries by their position, if there is one.
    pub(super) fn position_scaling(&self, rope: &Rope) -> Result<Option<PositionScaling>, String> {
        let Self { field, parameters, .. } = self;
        let Some(beta) = given(parameters, "llama_4_scaling_beta") else { return Ok(None) };
        let beta = beta.as_f64().filter(|beta| beta.is_finite() && *beta >= 0.0);
        let beta =
            beta.ok_or(format!("{field}.llama_4_scaling_beta: must be a number that is not negative"))?;
        let original_max_position_embeddings = match rope.scaling {
            RopeScaling::Yarn { original_max_position_embeddings, .. } => original_max_position_embeddings,
            _ => return Err(format!("{field}.llama_4_scaling_beta: needs rope_type yarn")),
        };
        Ok(Some(PositionScaling { beta, original_max_position_embeddings }))
    }

    /// Reads the part of a head's features that are rotated.
    fn partial_rotary_factor(&self) -> Result<f64, String> {
        let Some(partial) = given(&self.parameters, "partial_rotary_factor").or(self.partial) else {
            return Ok(1.0);
        };
        let partial = partial.as_f64().filter(|partial| *partial > 0.0 && *partial <= 1.0);
        partial.ok_or(format!("{}.partial_rotary_factor: must be a number above 0 and at most 1", self.field))
    }

    /// Reads the number of features of a head that are rotated.
    fn rotary_dim(&self) -> Result<usize, String> {
        let Self { field, head_dim, .. } = self;
        let name = format!("{field}.partial_rotary_factor");
        let partial = self.partial_rotary_factor()?;
        let rotary_dim = (*head_dim as f64 * partial) as usize;
        if partial < 1.0 && !self.is_phi3 {
            return Err(format!(
                "{name}: must be 1; rotary embeddings of a part of a head are supported for Phi 3 and with \
                 rope_type proportional"
            ));
        }
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(format!(
                "{name}: {rotary_dim} of the {head_dim} features of a head would be rotated; it must be an \
                 even number"
            ));
        }
        Ok(rotary_dim)
    }

    /// The context length of the original model, if it is given.
    fn original(&self, number: &impl Fn(&str) -> Result<f64, String>) -> Result<Option<f64>, String> {
        const KEY: &str = "original_max_position_embeddings";
        match self.original {
            Some(original) => {
                let original = original.as_f64().filter(|original| *original >= 1.0);
                original.map(Some).ok_or(format!("{KEY}: must be a positive number"))
            }
            // The default of Transformers' class, which has priority too.
            None if self.is_phi3 => Ok(Some(4096.0)),
            None => given(&self.parameters, KEY).map(|_| number(KEY)).transpose(),
        }
    }

    fn longrope(
        &self,
        number: &impl Fn(&str) -> Result<f64, String>,
        pairs: usize,
    ) -> Result<RopeScaling, String> {
        let Self { field, parameters, max_position_embeddings, .. } = self;
        let list = |key: &str| {
            let values = parameters.get(key).and_then(Value::as_array);
            let values: Option<Vec<f64>> = values
                .and_then(|values| values.iter().map(|value| value.as_f64().filter(|v| *v > 0.0)).collect());
            values.filter(|values| values.len() == pairs).ok_or(format!(
                "{field}.{key}: must be a list of {pairs} positive numbers, one for each pair of rotated \
                 features"
            ))
        };
        let optional = |key: &str| given(parameters, key).map(|_| number(key)).transpose();
        let original = self.original(number)?.unwrap_or(*max_position_embeddings);
        let factor = optional("factor")?.unwrap_or(max_position_embeddings / original);
        let attention_factor = match optional("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short_factor: list("short_factor")?,
            long_factor: list("long_factor")?,
            original_max_position_embeddings: original,
            attention_factor,
        })
    }

    fn yarn(&self, number: &impl Fn(&str) -> Result<f64, String>) -> Result<RopeScaling, String> {
        let Self { field, parameters, max_position_embeddings, .. } = self;
        if parameters.get("truncate").is_some_and(|truncate| *truncate != Value::Bool(true)) {
            return Err(format!("{field}.truncate: must be true; a ramp of other bounds is not supported"));
        }
        let optional = |key: &str| given(parameters, key).map(|_| number(key)).transpose();
        let original = self.original(number)?.unwrap_or(*max_position_embeddings);
        let factor = number("factor")?;
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
