//! Tests (`is ...`) that hold for other values in Jinja than in minijinja.

use minijinja::value::ValueKind;
use minijinja::{Environment, Value};

use super::number::PythonNumber;

/// Adds the tests.
pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_iterable);
    environment.add_test("number", is_number);
    environment.add_test("float", |value: &Value| is_number(value) && !is_integer(value) && !is_bool(value));
    environment.add_test("integer", is_integer);
}

/// What Python can iterate over: strings and undefined values too, but not `none`. In Jinja all of
/// these are sequences too.
fn is_iterable(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Undefined
    )
}

/// Python's booleans are numbers.
fn is_number(value: &Value) -> bool {
    value.is_number() || is_bool(value) || value.downcast_object_ref::<PythonNumber>().is_some()
}

fn is_bool(value: &Value) -> bool {
    value.kind() == ValueKind::Bool
}

fn is_integer(value: &Value) -> bool {
    value.is_integer() || value.downcast_object_ref::<PythonNumber>().is_some_and(|number| !number.is_float)
}
