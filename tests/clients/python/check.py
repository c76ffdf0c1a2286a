"""Checks a coordinator's responses: python check.py HOST:PORT EXAMPLE

A worker must be connected. EXAMPLE is a directory with `base/` and `train.jsonl`.
"""

import json
import pathlib
import sys
import tempfile

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lora_client import Client

STEPS = 3


def main(address, example):
    client = Client(address)
    jobs = client.service("lora.v1.FineTuning")
    health(client)
    workers = jobs.ListWorkers(jobs.message("ListWorkersRequest")()).workers
    assert workers and all(worker.name and worker.numerics_id for worker in workers), workers
    refusals(client, jobs)
    request = submit_request(client, jobs, pathlib.Path(example), idempotency_key="python")
    plan(jobs, request)
    succeeds(client, jobs, request)
    is_cancelled(jobs, request)
    print("all checks passed")


def health(client):
    services = set(client.services())
    for name in ["FineTuning", "Artifacts", "WorkerControl"]:
        assert f"lora.v1.{name}" in services, services
    check = client.service("grpc.health.v1.Health")
    for service in ["", "lora.v1.FineTuning", "lora.v1.Artifacts"]:
        answer = check.Check(check.message("HealthCheckRequest")(service=service))
        assert answer.status == 1, f"{service!r} is not serving: {answer}"
    error = refused(lambda: check.Check(check.message("HealthCheckRequest")(service="lora.v1.Nothing")))
    assert error.code() == grpc.StatusCode.NOT_FOUND, error


def refusals(client, jobs):
    """Checks the status code of errors, and the details for programs."""
    submit = jobs.message("SubmitJobRequest")
    unknown = jobs.message("GetJobRequest")(job_id="unknown-job")
    error = refused(lambda: jobs.GetJob(unknown))
    assert error.code() == grpc.StatusCode.NOT_FOUND and "unknown-job" in error.details(), error
    assert reason(error) == "UNKNOWN_JOB", details(error)

    error = refused(lambda: jobs.SubmitJob(submit(job={"name": "a", "adapter": {"r": 0}})))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    (violation,) = details(error)["BadRequest"].field_violations
    assert violation.field and violation.description, violation
    assert reason(error) == "INVALID_FIELD", details(error)

    error = refused(lambda: jobs.SubmitJob(submit(job={"name": "a", "revision": 99})))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert "revision" in error.details(), error

    # The header of this upload has another hash than its content.
    artifacts = client.service("lora.v1.Artifacts")
    upload = artifacts.message("UploadRequest")
    messages = [upload(header={"digest": {"size": 3, "sha256": bytes(32)}}), upload(chunk=b"abc")]
    error = refused(lambda: artifacts.Upload(iter(messages)))
    assert error.code() == grpc.StatusCode.DATA_LOSS and reason(error) == "DAMAGED", error
    find_missing = artifacts.message("FindMissingRequest")
    missing = artifacts.FindMissing(find_missing(files=[{"size": 3, "sha256": bytes(32)}]))
    assert len(missing.missing) == 1, missing


def submit_request(client, jobs, example, idempotency_key):
    with tempfile.TemporaryDirectory() as directory:
        train = pathlib.Path(directory) / "train.jsonl"
        rows = (example / "train.jsonl").read_text().splitlines()[:24]
        train.write_text("\n".join(rows) + "\n")
        train = client.upload(train)
    names = ["config.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    base = [client.upload(example / "base" / name) for name in names]
    job = {
        "name": "from-python",
        "adapter": {"r": 2, "target_modules": {"names": {"names": ["q_proj", "v_proj"]}}},
        "data": {"max_length": 96},
        "training": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    }
    inputs = {"base": {"files": {"files": base}}, "train": [train]}
    return jobs.message("SubmitJobRequest")(idempotency_key=idempotency_key, job=job, inputs=inputs)


def plan(jobs, request):
    answer = jobs.PlanJob(jobs.message("PlanJobRequest")(job=request.job, inputs=request.inputs))
    assert (answer.total_steps, answer.micro_batches, list(answer.problems)) == (STEPS, 2, []), answer
    assert set(answer.modules) == {"q_proj", "v_proj"} and "⟦" in answer.sample, answer
    assert answer.train.rows_kept == answer.train.rows_read > answer.all_reduce_bytes == 0, answer
    for memory in (answer.memory_cpu, answer.memory_gpu):
        assert memory.peak > memory.base + memory.adapter + memory.moments > 0 and answer.flops > 0, answer


def succeeds(client, jobs, request):
    """Checks a job from its submission to the files of its result."""
    job = jobs.SubmitJob(request)
    assert job.name == "from-python" and job.spec.training.learning_rate > 0, "a setting has no default"
    assert jobs.SubmitJob(request).job_id == job.job_id, "the same key gave another job"
    other = type(request)()
    other.CopyFrom(request)
    other.job.training.max_steps = STEPS + 1
    error = refused(lambda: jobs.SubmitJob(other))
    assert error.code() == grpc.StatusCode.ALREADY_EXISTS and reason(error) == "IDEMPOTENCY_KEY_TAKEN", error

    events, steps = [], []
    for message in jobs.WatchJob(jobs.message("WatchJobRequest")(job_id=job.job_id), timeout=300):
        if message.HasField("event"):
            events.append(message.event)
        else:
            steps.append(message.step.metrics)
    assert [event.number for event in events] == list(range(1, len(events) + 1)), events
    assert [step.step for step in steps] == list(range(1, STEPS + 1)), steps
    states = [event.state_changed.state for event in events if event.HasField("state_changed")]
    assert states == ["validating", "queued", "preparing", "running", "succeeded"], states

    job = jobs.GetJob(jobs.message("GetJobRequest")(job_id=job.job_id))
    assert (job.state, job.completed_steps, job.facts.total_steps) == ("succeeded", STEPS, STEPS), job
    names = {file.name for file in job.result}
    expected = {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "receipt.json"}
    assert expected <= names, names
    config = json.loads(client.download(job.job_id, "adapter_config.json"))
    assert config["peft_type"] == "LORA" and config["r"] == 2, config
    rows = [json.loads(row) for row in client.download(job.job_id, "metrics.jsonl").splitlines()]
    assert [row["loss"] for row in rows] == [step.loss for step in steps], rows
    listed = jobs.ListJobs(jobs.message("ListJobsRequest")(states=["succeeded"])).jobs
    assert [other.job_id for other in listed] == [job.job_id], listed
    error = refused(lambda: jobs.CancelJob(jobs.message("CancelJobRequest")(job_id=job.job_id)))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
    error = refused(lambda: client.download(job.job_id, "nothing"))
    assert error.code() == grpc.StatusCode.NOT_FOUND and reason(error) == "UNKNOWN_FILE", error


def is_cancelled(jobs, request):
    """Checks that a job that needs more workers than exist stays queued and can be cancelled."""
    request.idempotency_key = ""
    request.job.training.global_batch_size = 16
    request.job.workers.min = request.job.workers.max = 8
    job = jobs.SubmitJob(request)
    watch = jobs.WatchJob(jobs.message("WatchJobRequest")(job_id=job.job_id, events_only=True), timeout=300)
    states = []
    for message in watch:
        states.append(message.event.state_changed.state)
        if states[-1] == "queued":
            jobs.CancelJob(jobs.message("CancelJobRequest")(job_id=job.job_id))
    assert states == ["validating", "queued", "cancelled"], states
    pages = jobs.ListJobs(jobs.message("ListJobsRequest")(page_size=1))
    assert len(pages.jobs) == 1 and pages.jobs[0].job_id == job.job_id and pages.next_page_token, pages
    rest = jobs.ListJobs(jobs.message("ListJobsRequest")(page_size=1, page_token=pages.next_page_token))
    assert [job.state for job in rest.jobs] == ["succeeded"] and not rest.next_page_token, rest


def refused(call):
    try:
        answer = call()
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"the call did not fail: {answer}")


def details(error):
    """The details of an error by the names of their types."""
    kinds = [error_details_pb2.BadRequest, error_details_pb2.ErrorInfo]
    known = {kind.DESCRIPTOR.full_name: kind for kind in kinds}
    found = {}
    for detail in rpc_status.from_call(error).details:
        kind = known[detail.type_url.rsplit("/", 1)[1]]
        found[kind.DESCRIPTOR.name] = kind.FromString(detail.value)
    return found


def reason(error):
    info = details(error)["ErrorInfo"]
    assert info.domain == "lora.v1", info
    return info.reason


if __name__ == "__main__":
    main(*sys.argv[1:])
