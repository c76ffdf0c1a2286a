//! The containers of `docker-compose.yml`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::container::{Container, Volume};
use crate::yaml::{list, text};
use crate::{dockerfile, repository};

/// Returns the containers of the repository's `docker-compose.yml` by the names of their services.
///
/// # Panics
/// If the file contains something that this parser does not support.
pub fn services() -> BTreeMap<String, Container> {
    parse(&fs::read_to_string(repository().join("docker-compose.yml")).unwrap())
}

/// Like [`services`], for the given text.
pub fn parse(text: &str) -> BTreeMap<String, Container> {
    let file: Value = serde_saphyr::from_str(text).unwrap();
    let services = file["services"].as_object().unwrap();
    services.iter().map(|(name, service)| (name.clone(), container(name, service))).collect()
}

fn container(name: &str, service: &Value) -> Container {
    let build = &service["build"];
    assert_eq!(build["dockerfile"], "deploy/docker/Dockerfile", "{name}");
    let target = text(&build["target"]);
    let image = dockerfile::stages().into_iter().find(|stage| stage.name == target);
    let image = image.unwrap_or_else(|| panic!("{name}: the Dockerfile has no target {target}"));
    let mut container = Container {
        location: format!("docker-compose.yml: {name}"),
        arguments: list(&service["command"]).map(text).collect(),
        environment: BTreeMap::new(),
        mounts: BTreeMap::new(),
        volumes: list(&service["tmpfs"]).map(|path| (PathBuf::from(text(path)), Volume::Scratch)).collect(),
        ports: list(&service["ports"]).map(|port| container_port(&text(port))).collect(),
        probes: image.healthcheck().into_iter().collect(),
        // Docker's default is 10 s.
        grace: Some(service.get("stop_grace_period").map_or(Duration::from_secs(10), seconds)),
        after: service["depends_on"].as_object().into_iter().flat_map(|all| all.keys().cloned()).collect(),
        image,
    };
    for (variable, value) in service["environment"].as_object().into_iter().flatten() {
        container.environment.insert(variable.clone(), Some(text(value)));
    }
    for volume in list(&service["volumes"]).map(text) {
        let parts: Vec<&str> = volume.split(':').collect();
        let target = PathBuf::from(parts[1]);
        match (parts[0].strip_prefix("./"), parts.get(2)) {
            (Some(path), Some(&"ro")) => {
                container.mounts.insert(target, repository().join(path));
            }
            (None, None) if is_name(parts[0]) => {
                container
                    .volumes
                    .insert(target, Volume::Persistent { name: parts[0].to_owned(), bytes: None });
            }
            _ => panic!("{name}: invalid volume {volume}: must be ./PATH:PATH:ro or NAME:PATH"),
        }
    }
    container
}

fn is_name(text: &str) -> bool {
    Path::new(text).components().eq([Component::Normal(text.as_ref())])
}

/// Returns the container's port in `ADDRESS:HOST:CONTAINER`.
fn container_port(text: &str) -> u16 {
    text.rsplit(':').next().unwrap().parse().unwrap()
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs(text(value).strip_suffix('s').unwrap().parse().unwrap())
}
