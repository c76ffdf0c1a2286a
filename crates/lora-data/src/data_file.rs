//! The files that a job names in its section `data`.

use std::io::ErrorKind;

use lora_spec::{FieldError, SourceFile};

/// Checks that the data file of `field` exists.
///
/// # Errors
/// The file does not exist, cannot be accessed, or is not a file.
pub fn check_data_file(field: &str, file: &SourceFile) -> Result<(), FieldError> {
    match file.path().metadata() {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(FieldError::new(field, format!("{file} is not a file"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(FieldError::new(field, format!("the file {file} does not exist")))
        }
        Err(error) => Err(FieldError::new(field, format!("{file}: {error}"))),
    }
}
