//! Checks for containers, wherever they are described.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lora_e2e::container::{Container, Volume, is_listen};
use lora_e2e::{Finished, compose, lora_coordinator, lora_worker, loractl, repository};
use serde_json::Value;

/// Directories for temporary files.
const SCRATCH: [&str; 2] = ["/tmp", "/dev/shm"];

/// The problems of a container. `coordinators` contains the `host:port` of each coordinator that it
/// can reach.
pub(crate) fn problems(container: &Container, coordinators: &[String]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut check = |right: bool, problem: String| {
        if !right {
            problems.push(format!("{}: {problem}", container.location));
        }
    };
    for word in container.arguments.iter().filter(|word| word.starts_with('/')) {
        check(
            container.file(word).is_some_and(|file| file.exists()),
            format!("{word} is not a file of this repository"),
        );
    }
    let refusal = refused(container);
    check(refusal.is_none(), format!("{:?}: {}", container.arguments, refusal.unwrap_or_default()));

    let daemon = container.program() != "loractl";
    for (name, value) in &container.environment {
        if daemon {
            check(name.starts_with("LORA__"), format!("{name} is not a variable of {}", container.program()));
        } else {
            check(name == "LORA_COORDINATOR_ADDR", format!("{name} is not a variable of loractl"));
            check(
                is_reachable_coordinator(value.as_deref(), coordinators),
                format!("{name} is not one of {coordinators:?}"),
            );
        }
    }
    if !daemon {
        return problems;
    }
    let settings = match container.settings() {
        Ok(settings) => settings,
        Err(problem) => {
            check(false, problem);
            return problems;
        }
    };
    let ports = listens(&settings);
    for port in &container.ports {
        check(ports.contains(port), format!("nothing listens on {port}"));
    }
    for (port, _) in &container.probes {
        check(Some(*port) == port_of(&settings["http.listen"]), format!("health is not served on {port}"));
    }
    for (key, directory) in settings.iter().filter(|(key, _)| key.ends_with("_dir")) {
        let volume = container.volumes.get(Path::new(directory.as_str().unwrap()));
        check(
            matches!(volume, Some(Volume::Persistent { .. })),
            format!("{key} {directory} is not on a persistent volume"),
        );
        let holds =
            |bytes: u64| settings.get("cache.max_bytes").is_none_or(|max| max.as_u64().unwrap() < bytes);
        if let Some(Volume::Persistent { bytes: Some(bytes), .. }) = volume {
            check(holds(*bytes), format!("the volume of {key} holds less than cache.max_bytes"));
        }
    }
    let directories: BTreeSet<&str> = settings.values().filter_map(Value::as_str).chain(SCRATCH).collect();
    for path in container.volumes.keys().map(|path| path.to_str().unwrap()) {
        check(directories.contains(path), format!("no setting uses the volume {path}"));
    }
    if let (Some(drain), Some(grace)) = (settings.get("drain_timeout_seconds"), container.grace) {
        check(
            grace.as_secs_f64() > drain.as_f64().unwrap(),
            format!("is killed after {grace:?}, but drains for {drain} s"),
        );
    }
    if let Some(coordinator) = settings.get("coordinator").filter(|_| !coordinators.is_empty()) {
        check(
            is_reachable_coordinator(coordinator.as_str(), coordinators),
            format!("coordinator is not one of {coordinators:?}"),
        );
    }
    problems
}

/// The ports that a daemon with these settings listens on.
pub(crate) fn listens(settings: &BTreeMap<String, Value>) -> BTreeSet<u16> {
    settings.iter().filter(|(key, _)| is_listen(key)).filter_map(|(_, address)| port_of(address)).collect()
}

/// Fails with all of `problems` if there are any.
pub(crate) fn expect_none(problems: impl IntoIterator<Item = String>) {
    let problems: Vec<String> = problems.into_iter().collect();
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

/// The error with which the program refuses its arguments. The program parses them before it shows
/// its help.
fn refused(container: &Container) -> Option<String> {
    let mut program = program(container);
    program.args(container.image.entrypoint().iter().skip(1)).args(&container.arguments).arg("--help");
    let finished = Finished::run(&mut program);
    (finished.code != Some(0)).then_some(finished.stderr)
}

/// The program of a container, built from this repository.
pub(crate) fn program(container: &Container) -> Command {
    match container.program().as_str() {
        "lora-coordinator" => lora_coordinator(),
        "lora-worker" => lora_worker(),
        "loractl" => loractl(),
        program => panic!("{}: {program} is not a program of this repository", container.location),
    }
}

fn is_reachable_coordinator(url: Option<&str>, coordinators: &[String]) -> bool {
    let address = url.and_then(|url| url.strip_prefix("http://"));
    address.is_some_and(|address| coordinators.iter().any(|one| one == address))
}

fn port_of(address: &Value) -> Option<u16> {
    address.as_str()?.rsplit_once(':')?.1.parse().ok()
}

#[test]
fn invalid_containers_are_detected() {
    type ContainerChange = fn(&mut Container);
    let wrong: [(&str, &str, ContainerChange); 20] = [
        ("worker-0", "unexpected argument '--port'", |c| c.arguments.push("--port".into())),
        ("worker-0", "--config /etc/x.toml: is not mounted", |c| c.arguments[1] = "/etc/x.toml".into()),
        ("worker-0", "no_such_key", |c| c.arguments.extend(["--set".into(), "no_such_key=1".into()])),
        ("worker-0", "must be a number", |c| set(c, "LORA__DRAIN_TIMEOUT_SECONDS", "soon")),
        ("worker-0", "is not a setting", |c| set(c, "LORA__DRAIN_TIMEOUT", "120")),
        ("worker-0", "LORA_NAME is not a variable of lora-worker", |c| set(c, "LORA_NAME", "w")),
        ("worker-0", "/configs/none.toml is not a file of this repository", |c| {
            c.mounts.insert("/configs".into(), repository().join("configs"));
            c.arguments.push("/configs/none.toml".into());
        }),
        ("worker-0", "coordinator is not one of", |c| set(c, "LORA__COORDINATOR", "http://coordinator:7401")),
        ("worker-0", "coordinator is not one of", |c| drop(c.environment.remove("LORA__COORDINATOR"))),
        ("worker-0", "nothing listens on 7412", |c| c.ports.push(7412)),
        ("coordinator", "nothing listens on 7400", |c| set(c, "LORA__GRPC__LISTEN", "0.0.0.0:7500")),
        ("worker-0", "health is not served on 7410", |c| c.probes.push((7410, "/healthz".into()))),
        ("worker-0", "health is not served on 7411", |c| set(c, "LORA__HTTP__LISTEN", "")),
        ("worker-0", "cache_dir \"/var/cache/loractl\" is not on a persistent", |c| c.volumes.clear()),
        ("worker-0", "cache_dir \"/srv\" is not on a persistent", |c| set(c, "LORA__CACHE_DIR", "/srv")),
        ("worker-0", "is not on a persistent volume", |c| {
            c.volumes.values_mut().for_each(|v| *v = Volume::Scratch)
        }),
        ("coordinator", "no setting uses the volume /srv", |c| {
            drop(c.volumes.insert("/srv".into(), Volume::Scratch))
        }),
        ("worker-0", "holds less than cache.max_bytes", |c| {
            let bytes = Some(100 << 30);
            c.volumes.insert("/var/cache/loractl".into(), Volume::Persistent { name: "cache".into(), bytes });
        }),
        ("worker-0", "drains for 120", |c| c.grace = Some(Duration::from_secs(120))),
        ("submit", "LORA_COORDINATOR_ADDR is not one of", |c| {
            set(c, "LORA_COORDINATOR_ADDR", "http://coordinator:7500")
        }),
    ];
    let services = compose::services();
    for (service, expected, change) in wrong {
        let mut container = services[service].clone();
        change(&mut container);
        let found = problems(&container, &["coordinator:7400".to_owned()]);
        assert!(found.iter().any(|problem| problem.contains(expected)), "not {expected:?}, but {found:#?}");
    }
}

fn set(container: &mut Container, name: &str, value: &str) {
    container.environment.insert(name.to_owned(), Some(value.to_owned()));
}
