//! Health checks and probes, against the HTTP service of the daemons.

use std::collections::BTreeSet;
use std::process::Command;

use lora_daemon::http::{Health, serve};
use lora_e2e::container::Container;
use lora_e2e::kustomize::Kustomization;
use lora_e2e::{compose, dockerfile, repository};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Every path of a probe is served, and the images' `healthcheck` distinguishes success from
/// failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_use_paths_that_the_daemons_serve() {
    let images = dockerfile::stages()
        .into_iter()
        .filter(|stage| stage.healthcheck().is_some())
        .map(Container::from_image);
    let manifests = Kustomization::read("base").containers();
    let containers: Vec<Container> =
        compose::services().into_values().chain(images).chain(manifests).collect();
    let paths: BTreeSet<&String> =
        containers.iter().flat_map(|container| &container.probes).map(|(_, path)| path).collect();
    assert_eq!(paths.iter().collect::<Vec<_>>(), [&"/healthz", &"/readyz"]);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (health, stop) = (Health::default(), CancellationToken::new());
    let serving = tokio::spawn(serve(listener, Registry::default(), health.clone(), stop.clone()));
    assert!(healthcheck(port, "/healthz") && !healthcheck(port, "/readyz"), "healthy, but not ready");
    health.set_ready(true, "");
    for path in paths {
        assert!(healthcheck(port, path), "{path}");
    }
    assert!(!healthcheck(port, "/nowhere"), "an unknown path is not healthy");
    stop.cancel();
    serving.await.unwrap().unwrap();
    assert!(!healthcheck(port, "/healthz"), "a service that has ended is not healthy");
}

/// Runs the script as the images do.
fn healthcheck(port: u16, path: &str) -> bool {
    let script = repository().join("deploy/docker/healthcheck");
    Command::new(script).args([&port.to_string(), path]).output().unwrap().status.success()
}
