//! The checks of a submit that need neither the store nor the files.

use lora_proto::v1::{self, base};
use lora_spec::{FieldError, JobSpec};
use prost::Message;
use sha2::{Digest, Sha256};

use super::inputs;
use crate::store::JobRow;

const MAX_KEY_BYTES: usize = 128;
const PRIORITIES: std::ops::RangeInclusive<i32> = -100..=100;

/// Returns the row of the job that the request submits.
pub(crate) fn row(request: v1::SubmitJobRequest) -> Result<JobRow, FieldError> {
    let mut identity = v1::SubmitJobRequest { idempotency_key: String::new(), ..request.clone() };
    if let Some(inputs) = &mut identity.inputs {
        // They follow from the rest, and another build of the client has others.
        inputs.tokens.clear();
    }
    let request_sha256 = Sha256::digest(identity.encode_to_vec()).to_vec();
    let v1::SubmitJobRequest { idempotency_key, job, inputs, priority } = request;
    let inputs = inputs.unwrap_or_default();
    let spec = spec(job.unwrap_or_default(), &inputs)?;
    if idempotency_key.len() > MAX_KEY_BYTES {
        let message = format!("has {} bytes; it must have at most {MAX_KEY_BYTES}", idempotency_key.len());
        return Err(FieldError::new("idempotency_key", message));
    }
    if !PRIORITIES.contains(&priority) {
        let message =
            format!("is {priority}; it must be from {} to {}", PRIORITIES.start(), PRIORITIES.end());
        return Err(FieldError::new("priority", message));
    }
    Ok(JobRow {
        id: format!("{}-{:08x}", spec.name, rand::random::<u32>()),
        idempotency_key,
        request_sha256,
        spec: v1::JobSpec::try_from(&spec)?,
        inputs,
        priority,
        ..JobRow::default()
    })
}

/// Checks the settings of a job, and returns them. A missing path is replaced by the name of the
/// input.
pub(crate) fn spec(mut job: v1::JobSpec, inputs: &v1::Inputs) -> Result<JobSpec, FieldError> {
    let data = job.data.get_or_insert_default();
    if data.train.is_empty() {
        data.train = inputs.train.iter().map(|file| file.name.clone()).collect();
    }
    data.eval = data.eval.take().or_else(|| Some(inputs.eval.as_ref()?.name.clone()));
    let model = job.model.get_or_insert_default();
    model.base = model.base.take().or_else(|| base_name(inputs.base.as_ref()?));
    let spec = JobSpec::try_from(job)?;
    spec.check()?;
    inputs::check(inputs, &spec)?;
    Ok(spec)
}

fn base_name(base: &v1::Base) -> Option<String> {
    Some(match base.source.as_ref()? {
        base::Source::Files(_) => "base".to_owned(),
        base::Source::Url(name) | base::Source::Path(name) => name.clone(),
    })
}
