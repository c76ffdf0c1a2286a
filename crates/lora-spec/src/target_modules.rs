//! The setting `adapter.target_modules`, and the modules that it selects, as in PEFT.

use std::fmt;

use regex::Regex;
use serde::Serialize;
use serde::de::{Deserialize, Deserializer, SeqAccess, Visitor};

use crate::foreign_values::target_pattern;
use crate::{FieldError, LinearModule, ModelConfig};

const FIELD: &str = "adapter.target_modules";

/// Which linear modules get an adapter, as PEFT's `target_modules`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear` (every linear module except the head), or a regular expression that matches a
    /// module's full name.
    Pattern(String),
    /// Names: a module matches if its name is one of them or ends with `.` and one of them.
    Names(Vec<String>),
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetModulesVisitor;
        impl<'de> Visitor<'de> for TargetModulesVisitor {
            type Value = TargetModules;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("all-linear, a regular expression or a list of names")
            }

            fn visit_str<E>(self, text: &str) -> Result<TargetModules, E> {
                Ok(target_pattern(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<TargetModules, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = seq.next_element()? {
                    names.push(name);
                }
                Ok(TargetModules::Names(names))
            }
        }
        deserializer.deserialize_any(TargetModulesVisitor)
    }
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::Pattern(Self::ALL_LINEAR.into())
    }
}

impl TargetModules {
    /// Returns whether a module with this full name is selected; `None` for a regular expression
    /// that only Python has.
    pub fn selects(&self, module: &str) -> Option<bool> {
        match self {
            Self::Pattern(pattern) if pattern == Self::ALL_LINEAR => Some(true),
            Self::Pattern(pattern) => Some(whole_match(pattern).ok()?.is_match(module)),
            Self::Names(names) => Some(names.iter().any(|name| is_named(module, name))),
        }
    }

    /// The value that selects every linear module except the output head, as in PEFT.
    pub const ALL_LINEAR: &str = "all-linear";

    /// Returns the linear modules of `model` that get an adapter, in the order of computation.
    ///
    /// # Errors
    /// An invalid regular expression, or a pattern or name that matches no module.
    pub fn resolve(&self, model: &ModelConfig) -> Result<Vec<LinearModule>, FieldError> {
        let modules = model.linear_modules();
        let path = |module: &LinearModule| model.module_path(module);
        let chosen: Vec<LinearModule> = match self {
            Self::Pattern(pattern) if pattern == Self::ALL_LINEAR => modules,
            Self::Pattern(pattern) => {
                let regex = whole_match(pattern).map_err(|error| {
                    // The other lines point at a column.
                    let text = error.to_string();
                    let cause = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
                    FieldError::new(FIELD, format!("{pattern:?} is not a regular expression: {cause}"))
                })?;
                let chosen: Vec<_> = modules.iter().filter(|m| regex.is_match(&path(m))).cloned().collect();
                if chosen.is_empty() {
                    return Err(no_match_error(pattern, model));
                }
                chosen
            }
            Self::Names(names) => {
                for name in names {
                    if !modules.iter().any(|m| is_named(&path(m), name)) {
                        return Err(no_match_error(name, model));
                    }
                }
                modules.into_iter().filter(|m| names.iter().any(|name| is_named(&path(m), name))).collect()
            }
        };
        Ok(chosen)
    }
}

fn whole_match(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

fn is_named(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

fn no_match_error(pattern: &str, model: &ModelConfig) -> FieldError {
    let modules = model.linear_modules();
    let mut names: Vec<&str> = Vec::new();
    for module in &modules {
        let last = module.name.rsplit('.').next().unwrap_or_default();
        if !names.contains(&last) {
            names.push(last);
        }
    }
    if pattern.contains(',') {
        let message =
            format!("{pattern:?} matches no linear module of the blocks; write several names as a list");
        return FieldError::new(
            FIELD,
            format!("{message}: [{}]", names.iter().take(2).copied().collect::<Vec<_>>().join(", ")),
        );
    }
    let full = modules.first().map(|module| model.module_path(module)).unwrap_or_default();
    FieldError::new(
        FIELD,
        format!(
            "{pattern:?} matches no linear module of the blocks; the modules are {} \
             (a full name is such as {full})",
            names.join(", ")
        ),
    )
}
