//! The files that a job names in its section `data`.

use std::io::ErrorKind;
use std::path::Path;

use lora_spec::FieldError;

/// Checks that the data file of `field` exists.
///
/// # Errors
/// `path` does not exist, cannot be accessed, or is not a file.
pub fn check_data_file(field: &str, path: &Path) -> Result<(), FieldError> {
    let shown = path.display();
    match path.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(FieldError::new(field, format!("{shown} is not a file"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(FieldError::new(field, format!("the file {shown} does not exist")))
        }
        Err(error) => Err(FieldError::new(field, format!("{shown}: {error}"))),
    }
}
