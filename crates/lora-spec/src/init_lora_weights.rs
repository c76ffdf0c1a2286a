//! The initialization of an adapter.

use std::fmt;
use std::str::FromStr;

use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The initialization of an adapter, with the values of PEFT's `init_lora_weights`.
///
/// Except for [`Self::Default`], the initial adapter is computed from the base's weights. With
/// PiSSA and OLoRA, the initial adapter is subtracted from the base, so that training starts with
/// the outputs of the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: Kaiming initialization of `A`, and zeros in `B`.
    #[default]
    Default,
    /// `olora`: the first `r` columns of Q and rows of R in the QR decomposition of the weight
    /// (arXiv 2406.01775).
    Olora,
    /// `pissa`: the weight's largest singular values and vectors (arXiv 2404.02948).
    Pissa,
    /// `pissa_niter_N`: an approximation of `pissa` by `N` rounds of a randomized subspace
    /// iteration, which is faster.
    PissaNiter(u32),
    /// `loftq`: the best approximation of rank `r` to the quantization error of the weight (arXiv
    /// 2310.08659).
    Loftq,
}

impl InitLoraWeights {
    /// Returns whether the initial adapter `A0`, `B0` is subtracted from a frozen weight `W0` with
    /// the scaling `s`: `W0 - s B0 A0`.
    pub fn subtracts_initial(self) -> bool {
        matches!(self, Self::Olora | Self::Pissa | Self::PissaNiter(_))
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Default => f.write_str("true"),
            Self::Olora => f.write_str("olora"),
            Self::Pissa => f.write_str("pissa"),
            Self::PissaNiter(rounds) => write!(f, "pissa_niter_{rounds}"),
            Self::Loftq => f.write_str("loftq"),
        }
    }
}

impl FromStr for InitLoraWeights {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let rounds =
            |word: &str| word.strip_prefix("pissa_niter_")?.parse().ok().filter(|n| (1..=100).contains(n));
        Ok(match word {
            "true" => Self::Default,
            "olora" => Self::Olora,
            "pissa" => Self::Pissa,
            "loftq" => Self::Loftq,
            _ => match rounds(word) {
                Some(rounds) => Self::PissaNiter(rounds),
                None => {
                    return Err(format!(
                        "{word:?} is not supported; supported: true, olora, pissa, \
                         pissa_niter_N (N from 1 to 100), loftq"
                    ));
                }
            },
        })
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordVisitor;
        impl Visitor<'_> for WordVisitor {
            type Value = InitLoraWeights;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("true, olora, pissa, pissa_niter_N or loftq")
            }

            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<InitLoraWeights, E> {
                value.to_string().parse().map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<InitLoraWeights, E> {
                word.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(WordVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::InitLoraWeights;

    #[test]
    fn values_match_peft() {
        for (json, value) in [
            ("true", InitLoraWeights::Default),
            ("\"olora\"", InitLoraWeights::Olora),
            ("\"pissa\"", InitLoraWeights::Pissa),
            ("\"pissa_niter_16\"", InitLoraWeights::PissaNiter(16)),
            ("\"loftq\"", InitLoraWeights::Loftq),
        ] {
            assert_eq!(serde_json::from_str::<InitLoraWeights>(json).unwrap(), value);
            assert_eq!(serde_json::to_string(&value).unwrap(), json);
            assert_eq!(value.to_string().parse(), Ok(value));
        }
        for wrong in
            ["false", "\"gaussian\"", "\"pissa_niter_\"", "\"pissa_niter_0\"", "\"pissa_niter_101\"", "3"]
        {
            let error = serde_json::from_str::<InitLoraWeights>(wrong).unwrap_err().to_string();
            assert!(error.contains("pissa_niter_N"), "{error}");
        }
    }
}
