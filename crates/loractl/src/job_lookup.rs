//! Lookup and listing of jobs.

use anyhow::{Result, bail};
use lora_proto::v1;
use tonic::Code;

use crate::client::{CallError, Client};

/// Maximum number of jobs in one answer; the limit of the protocol.
const MAX_PAGE_SIZE: u32 = 1000;
/// Maximum number of jobs in the error for a prefix that matches several.
const MAX_LISTED: usize = 10;

/// Returns the job with this id, or the only job whose id starts with it.
pub(crate) async fn find(client: &Client, wanted: &str) -> Result<v1::Job> {
    if wanted.is_empty() {
        bail!("the job id is empty; `loractl list` shows the ids of all jobs");
    }
    match client.job(wanted).await {
        Err(CallError::Refused(status)) if status.code() == Code::NotFound => {}
        answer => return Ok(answer?),
    }
    let jobs = list(client, &[], None).await?;
    let mut matching: Vec<v1::Job> = jobs.into_iter().filter(|job| job.job_id.starts_with(wanted)).collect();
    match matching.len() {
        0 => bail!("job {wanted:?} does not exist; `loractl list` shows the jobs"),
        1 => Ok(matching.swap_remove(0)),
        all => {
            let named = matching
                .iter()
                .take(MAX_LISTED)
                .map(|job| format!("{} ({}, {})", job.job_id, job.name, job.state));
            let mut text = named.collect::<Vec<_>>().join(", ");
            if all > MAX_LISTED {
                text += &format!(" and {} more", all - MAX_LISTED);
            }
            bail!("{wanted:?} could be one of {all} jobs: {text}; give a longer prefix of the id")
        }
    }
}

/// Returns the jobs in one of `states` (in any state if the list is empty), newest first, at most
/// `limit`.
pub(crate) async fn list(
    client: &Client,
    states: &[String],
    limit: Option<usize>,
) -> Result<Vec<v1::Job>, CallError> {
    let mut jobs = Vec::new();
    let mut page_token = String::new();
    loop {
        let left = limit.map_or(usize::MAX, |limit| limit - jobs.len());
        let page_size = u32::try_from(left).unwrap_or(MAX_PAGE_SIZE).min(MAX_PAGE_SIZE);
        if page_size == 0 {
            return Ok(jobs);
        }
        let request = v1::ListJobsRequest { page_size, page_token, states: states.to_vec() };
        let page = client.call(client.jobs().list_jobs(request)).await?;
        jobs.extend(page.jobs.into_iter().take(left));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(jobs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_coordinator::FakeCoordinator;

    async fn client(ids: &[&str]) -> (FakeCoordinator, Client) {
        let jobs = ids.iter().map(|id| v1::Job {
            job_id: (*id).into(),
            name: format!("name-of-{id}"),
            state: "queued".into(),
            ..v1::Job::default()
        });
        let fake = FakeCoordinator::serve(jobs.collect()).await;
        let client = fake.client().await;
        (fake, client)
    }

    #[tokio::test]
    async fn an_id_or_the_only_prefix_finds_a_job() {
        let (_fake, client) = client(&["abc", "abcd", "b12", "c3"]).await;
        for (wanted, found) in [("abc", "abc"), ("abcd", "abcd"), ("b", "b12"), ("c3", "c3")] {
            assert_eq!(find(&client, wanted).await.unwrap().job_id, found, "{wanted}");
        }
    }

    #[tokio::test]
    async fn a_prefix_of_several_jobs_lists_them() {
        let (_fake, client) = client(&["abc", "abcd", "b12"]).await;
        let error = find(&client, "ab").await.unwrap_err().to_string();
        assert!(error.contains("2 jobs: abc (name-of-abc, queued), abcd (name-of-abcd, queued);"), "{error}");
        for wanted in ["x", ""] {
            let error = find(&client, wanted).await.unwrap_err().to_string();
            assert!(error.contains("`loractl list`"), "{error}");
        }
    }

    #[tokio::test]
    async fn list_reads_all_pages() {
        let ids: Vec<String> = (0..7).map(|i| format!("j{i}")).collect();
        let (fake, client) = client(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
        fake.largest_page(3);
        let listed = |jobs: Vec<v1::Job>| jobs.into_iter().map(|job| job.job_id).collect::<Vec<_>>();
        assert_eq!(listed(list(&client, &[], None).await.unwrap()), ids);
        assert_eq!(listed(list(&client, &[], Some(4)).await.unwrap()), ids[..4]);
        assert_eq!(listed(list(&client, &["running".into()], None).await.unwrap()), Vec::<String>::new());
    }
}
