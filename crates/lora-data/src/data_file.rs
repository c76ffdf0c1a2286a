//! The files that a job names in its section `data`.

use std::io::ErrorKind;

use lora_spec::{FieldError, SourceFile};

use crate::file_format::FileFormat;

/// Checks that the data file of `field` exists, and that its name has the extension of a dataset.
///
/// # Errors
/// The file does not exist, cannot be accessed, is not a file, or has another extension.
pub fn check_data_file(field: &str, file: &SourceFile) -> Result<(), FieldError> {
    match file.path().metadata() {
        Ok(metadata) if metadata.is_file() => FileFormat::from_name(file.name())
            .map(drop)
            .map_err(|error| FieldError::new(field, error.to_string())),
        Ok(_) => Err(FieldError::new(field, format!("{file} is not a file"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Err(FieldError::new(field, format!("the file {file} does not exist")))
        }
        Err(error) => Err(FieldError::new(field, format!("{file}: {error}"))),
    }
}
