//! Small jobs on the example's base.

use std::path::PathBuf;

use lora_proto::v1::{self, Assignment, StoredFile};
use lora_spec::JobSpec;

use crate::fake::{FakeCoordinator, WorkerStream};

/// More steps than any test waits for.
pub(crate) const ENDLESS: u64 = 1_000_000;

const ROWS: &str = r#"{"prompt": "one", "completion": "1"}
{"prompt": "two", "completion": "2"}
{"prompt": "three", "completion": "3"}
{"prompt": "four", "completion": "4"}
"#;

pub(crate) fn base() -> PathBuf {
    lora_test_kit::example("base")
}

/// A job of `steps` steps, of two micro-batches each.
pub(crate) fn spec(steps: u64) -> JobSpec {
    let mut job = JobSpec { name: "tiny".into(), ..JobSpec::default() };
    job.model.base = base();
    // A path of the machine on which the job was written.
    job.data.train = "/home/me/rows.jsonl".into();
    job.adapter.r = 2;
    job.training.global_batch_size = 2;
    job.training.micro_batch_size = 1;
    job.training.max_steps = Some(steps);
    job.training.save_steps = ENDLESS;
    job
}

/// The assignment of rank 0 in the first generation of a job, with the peer addresses of `links`.
pub(crate) fn assignment(fake: &FakeCoordinator, job: &JobSpec, links: &[&WorkerStream]) -> Assignment {
    over_rows(fake, job, ROWS, links)
}

/// The same assignment with other rows.
pub(crate) fn over_rows(
    fake: &FakeCoordinator,
    job: &JobSpec,
    rows: &str,
    links: &[&WorkerStream],
) -> Assignment {
    let base = v1::base::Source::Path(base().to_str().unwrap().into());
    Assignment {
        job_id: "job-1".into(),
        generation: 1,
        job: Some(v1::JobSpec::try_from(job).unwrap()),
        inputs: Some(v1::Inputs {
            base: Some(v1::Base { source: Some(base) }),
            train: vec![StoredFile {
                name: "rows.jsonl".into(),
                digest: Some(fake.store.add(rows.as_bytes())),
            }],
            ..v1::Inputs::default()
        }),
        rank: 0,
        peers: links.iter().map(|link| link.hello.peer_address.clone()).collect(),
        token: "secret".into(),
        checkpoint: None,
    }
}

/// The assignment of `rank` in the group of `assignment`.
pub(crate) fn place(assignment: &Assignment, rank: u32) -> Assignment {
    Assignment { rank, ..assignment.clone() }
}

/// The same assignment in the next generation.
pub(crate) fn newer(assignment: &Assignment) -> Assignment {
    Assignment { generation: assignment.generation + 1, ..assignment.clone() }
}
