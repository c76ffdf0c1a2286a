//! Python's views of a dict: `keys()`, `values()` and `items()`.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Tuple, from_args};
use minijinja::{Error, ErrorKind, Value};

use super::python;

/// The keys, values or pairs of a dict.
#[derive(Debug)]
pub(super) struct DictView {
    /// The name of the type in Python.
    pub(super) name: &'static str,
    pub(super) items: Vec<Value>,
}

impl DictView {
    /// Calls a method that returns a view.
    pub(super) fn call(dict: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
        let name = match method {
            "keys" => "dict_keys",
            "values" => "dict_values",
            "items" => "dict_items",
            _ => return Err(Error::from(ErrorKind::UnknownMethod)),
        };
        let () = from_args(args)?;
        let items = dict.try_iter()?.map(|key| {
            Ok(match method {
                "keys" => key,
                "values" => dict.get_item(&key)?,
                _ => {
                    let value = dict.get_item(&key)?;
                    Tuple::from([key, value]).into()
                }
            })
        });
        let items = items.collect::<Result<Vec<_>, Error>>()?;
        Ok(Value::from_object(Self { name, items }))
    }
}

impl Object for DictView {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.items.clone())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.items.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({})", self.name, python::repr(&Value::from(self.items.clone())))
    }
}
