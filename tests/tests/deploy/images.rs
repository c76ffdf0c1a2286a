//! `deploy/docker/Dockerfile`.

use std::fs;

use lora_e2e::container::Container;
use lora_e2e::dockerfile::{Stage, parse};
use lora_e2e::repository;

use crate::containers::{expect_none, listens, problems};

const TARGETS: [&str; 4] = ["coordinator", "worker", "worker-cuda", "loractl"];
/// Packages that a worker for GPUs loads besides the CUDA runtime, which NVIDIA's base image has.
const CUDA_PACKAGES: [&str; 3] = ["libcublas-13-0", "libcurand-13-0", "libnccl2"];

#[test]
fn images_match_the_programs() {
    expect_none(problems_in(&text()));
}

#[test]
fn invalid_dockerfiles_are_detected() {
    for (old, new, expected) in [
        ("AS worker-cuda", "AS cuda", "no target worker-cuda"),
        ("\"7411\", \"/readyz\"", "\"7410\", \"/readyz\"", "health is not served on 7410"),
        ("EXPOSE 7400 7401", "EXPOSE 7400 7402", "nothing listens on 7402"),
        ("EXPOSE 7410 7411", "EXPOSE 7410", "exposes {7410}"),
        ("VOLUME /var/cache/loractl", "VOLUME /cache", "no setting uses the volume /cache"),
        ("-m 0750 /var/cache/loractl", "-m 0750 /var/cache", "/var/cache/loractl is not the user's"),
        (
            "-o 10001 -g 10001 -m 0750 /var/lib",
            "-o 10000 -g 10001 -m 0750 /var/lib",
            "coordinator is not the user's",
        ),
        ("USER 10001:10001", "USER lora", "user lora"),
        ("USER 10001:10001", "USER 0:0", "user 0:0"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "stop signal"),
        ("RUST_VERSION=1.95.0", "RUST_VERSION=1.94.0", "too old"),
        ("image.version=\"0.1.0\"", "image.version=\"0.0.9\"", "version"),
        ("image.licenses=\"Apache-2.0\"", "image.licenses=\"MIT\"", "licence"),
        ("image.title=\"loractl\"", "image.title=\"lora\"", "title"),
        ("-p lora-coordinator ", "", "coordinator: is not built by stage build"),
        (
            "install -D -t /out target/release/lora-coordinator",
            "install -D -t /out",
            "is not built by stage build",
        ),
        ("/out/loractl /usr/local/bin/", "/out/loractl /opt/", "loractl: does not hold loractl"),
        ("ENTRYPOINT [\"loractl\"]", "ENTRYPOINT [\"loractl\", \"--loud\"]", "unexpected argument '--loud'"),
        ("-p lora-worker --features cuda", "-p lora-worker", "not built for CUDA"),
        ("libnccl2=2.28.9-1+cuda13.0", "libnccl-dev=2.28.9-1+cuda13.0", "has no libnccl2"),
        ("libcublas-13-0=13.*", "libcublas-12-8=12.8.*", "has no libcublas-13-0"),
        ("CUDA_VERSION=13.0.2", "CUDA_VERSION=12.8.1", "is not of CUDA 13.0"),
    ] {
        let text = text();
        assert!(text.contains(old), "{old:?} is not in the Dockerfile");
        let found = problems_in(&text.replace(old, new));
        assert!(found.iter().any(|problem| problem.contains(expected)), "not {expected:?}, but {found:#?}");
    }
}

fn problems_in(text: &str) -> Vec<String> {
    let stages = parse(text);
    let mut problems = Vec::new();
    for target in TARGETS {
        match stages.iter().find(|stage| stage.name == target) {
            Some(stage) => problems.extend(problems_in_image(stage, &stages)),
            None => problems.push(format!("no target {target}")),
        }
    }
    problems
}

fn problems_in_image(image: &Stage, stages: &[Stage]) -> Vec<String> {
    let container = Container::from_image(image.clone());
    let mut problems = problems(&container, &[]);
    let mut check = |right: bool, problem: String| {
        if !right {
            problems.push(format!("{}: {problem}", image.name));
        }
    };
    if let Ok(settings) = container.settings() {
        let exposed = container.ports.iter().copied().collect();
        check(
            listens(&settings) == exposed,
            format!("exposes {exposed:?}, listens on {:?}", listens(&settings)),
        );
    }

    let user = image.last("USER").unwrap_or_default();
    let (uid, gid) = user.split_once(':').unwrap_or_default();
    let is_some_user = |id: &str| id.parse::<u32>().is_ok_and(|id| id != 0);
    check(is_some_user(uid) && is_some_user(gid), format!("user {user}: not UID:GID other than root"));
    for path in image.all("VOLUME").chain(image.last("WORKDIR")) {
        let made = format!("install -d -o {uid} -g {gid} -m 0750 {path}");
        check(image.all("RUN").any(|command| command == made), format!("{path} is not the user's"));
    }

    check(image.last("STOPSIGNAL") == Some("SIGTERM"), "the stop signal is not SIGTERM".into());
    let label = |name: &str| image.label(&format!("org.opencontainers.image.{name}"));
    check(label("version") == Some(env!("CARGO_PKG_VERSION")), format!("version {:?}", label("version")));
    check(label("licenses") == Some(&license()), format!("licence {:?}", label("licenses")));
    check(label("title") == Some(&container.program()), format!("title {:?}", label("title")));

    let program = container.program();
    let copied = image.all("COPY").find_map(|copy| {
        let from = copy.strip_prefix("--from=")?.strip_suffix(&format!(" /out/{program} /usr/local/bin/"))?;
        stages.iter().find(|stage| stage.name == from)
    });
    let Some(build) = copied else {
        check(false, format!("does not hold {program}"));
        return problems;
    };
    let commands = build.all("RUN").last().unwrap_or_default();
    let builds =
        commands.contains("cargo build --locked --release") && commands.contains(&format!("-p {program}"));
    let installs = commands.contains(&format!("target/release/{program}"));
    check(builds && installs, format!("is not built by stage {}", build.name));
    check(!is_too_old(rust(build, stages)), format!("{} is too old", rust(build, stages)));
    if image.name == "worker-cuda" {
        check(commands.contains("--features cuda"), "is not built for CUDA".into());
        for image in [&image.base, &build.base] {
            check(image.starts_with("nvidia/cuda:13.0."), format!("{image} is not of CUDA 13.0"));
        }
        let installed: Vec<&str> = image.all("RUN").flat_map(str::split_whitespace).collect();
        for package in CUDA_PACKAGES {
            let version = format!("{package}=");
            check(installed.iter().any(|word| word.starts_with(&version)), format!("has no {package}"));
        }
    }
    problems
}

/// The image from which a build stage has cargo.
fn rust<'a>(build: &'a Stage, stages: &'a [Stage]) -> &'a str {
    let toolchain = build
        .all("COPY")
        .find_map(|copy| copy.strip_prefix("--from=")?.strip_suffix(" /usr/local/cargo /usr/local/cargo"));
    let toolchain = toolchain.and_then(|from| stages.iter().find(|stage| stage.name == from));
    &toolchain.unwrap_or(build).base
}

/// Whether the version in `rust:MAJOR.MINOR.PATCH-VARIANT` is too old.
fn is_too_old(image: &str) -> bool {
    let version =
        |text: &str| -> Option<Vec<u32>> { text.split('.').map(|part| part.parse().ok()).collect() };
    let has = image.strip_prefix("rust:").and_then(|tag| version(tag.split('-').next()?));
    has.is_none_or(|has| has < version(env!("CARGO_PKG_RUST_VERSION")).unwrap())
}

fn license() -> String {
    let manifest = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
    let manifest: toml::Table = manifest.parse().unwrap();
    manifest["workspace"]["package"]["license"].as_str().unwrap().to_owned()
}

fn text() -> String {
    fs::read_to_string(repository().join("deploy/docker/Dockerfile")).unwrap()
}
