//! `deploy/kubernetes`. `tests/deploy/check.sh` checks schemas, Pod Security and the references
//! between objects on the output of `kubectl kustomize`.

use std::collections::BTreeSet;

use lora_e2e::kustomize::{Kustomization, split_image};
use serde_json::Value;

use crate::containers::{expect_none, listens, problems};

const OVERLAYS: [&str; 2] = ["overlays/cpu", "overlays/gpu"];

#[test]
fn manifest_containers_match_the_programs() {
    for name in ["base"].iter().chain(&OVERLAYS) {
        expect_none(problems_in(&Kustomization::read(name)));
    }
}

#[test]
fn invalid_manifests_are_detected() {
    let container = |location: &str| format!("/spec/template/spec/containers/0/{location}");
    let only_http = serde_json::json!([{"name": "http", "containerPort": 7411}]);
    let storage = "/spec/volumeClaimTemplates/0/spec/resources/requests/storage";
    for (location, wrong, expected) in [
        (container("ports/0/containerPort"), Value::from(7412), "nothing listens on 7412"),
        (container("ports"), only_http, "names {7411}"),
        (container("args/1"), "/etc/loractl/coordinator.toml".into(), "is not mounted"),
        (
            container("volumeMounts/0/mountPath"),
            "/cache".into(),
            "cache_dir \"/var/cache/loractl\" is not on a persistent volume",
        ),
        (container("env/0/name"), "LORA__NAMES".into(), "is not a setting"),
        (container("lifecycle/preStop/exec/command/2"), "sleep 5".into(), "does not drain"),
        (container("livenessProbe/httpGet/port"), "peer".into(), "health is not served on 7410"),
        ("/spec/template/spec/terminationGracePeriodSeconds".into(), 120.into(), "drains for 120"),
        ("/spec/template/spec/securityContext/runAsUser".into(), 1000.into(), "runs as 1000"),
        (storage.into(), "100Gi".into(), "holds less than cache.max_bytes"),
    ] {
        let mut base = Kustomization::read("base");
        *stateful_set(&mut base, "lora-worker").pointer_mut(&location).unwrap() = wrong;
        let found = problems_in(&base);
        assert!(found.iter().any(|problem| problem.contains(expected)), "not {expected:?}, but {found:#?}");
    }
}

/// The overlays use the Dockerfile's images in this version, and the workers for GPUs have a GPU.
#[test]
fn overlays_name_the_images() {
    for name in OVERLAYS {
        let mut overlay = Kustomization::read(name);
        for (owner, image) in [("lora-coordinator", "lora-coordinator"), ("lora-worker", worker_image(name))]
        {
            let container = &stateful_set(&mut overlay, owner)["spec"]["template"]["spec"]["containers"][0];
            let tagged = (image.to_owned(), Some(env!("CARGO_PKG_VERSION").to_owned()));
            assert_eq!(split_image(container["image"].as_str().unwrap()), tagged, "{name}");
            let gpus = &container["resources"]["limits"]["nvidia.com/gpu"];
            let on_gpu = image.ends_with("-cuda");
            assert_eq!(gpus.as_u64(), on_gpu.then_some(1), "{name}: {owner}");
            let env = container["env"].as_array().into_iter().flatten();
            let device = env.clone().find(|variable| variable["name"] == "LORA__DEVICE");
            assert_eq!(
                device.map(|device| &device["value"]),
                on_gpu.then_some(&"cuda:0".into()),
                "{name}: {owner}"
            );
        }
    }
}

fn worker_image(overlay: &str) -> &'static str {
    if overlay == "overlays/gpu" { "lora-worker-cuda" } else { "lora-worker" }
}

fn problems_in(kustomization: &Kustomization) -> Vec<String> {
    let coordinators: Vec<String> =
        kustomization.addresses().into_iter().filter(|address| address.ends_with(":7400")).collect();
    let mut found = Vec::new();
    let containers = kustomization.containers();
    assert_eq!(containers.len(), 2, "{}", kustomization.name);
    for container in &containers {
        found.extend(problems(container, &coordinators));
        if let Ok(settings) = container.settings() {
            let named: BTreeSet<u16> = container.ports.iter().copied().collect();
            if listens(&settings) != named {
                found.push(format!(
                    "{}: names {named:?}, listens on {:?}",
                    container.location,
                    listens(&settings)
                ));
            }
        }
    }
    for (owner, container) in kustomization.pods().zip(&containers) {
        let pod = &owner["spec"]["template"]["spec"];
        let user = &pod["securityContext"]["runAsUser"];
        if container.image.last("USER").unwrap().split(':').next() != Some(&user.to_string()) {
            let problem = format!("runs as {user}, but its image's files have another owner");
            found.push(format!("{}: {problem}", container.location));
        }
        let hook = &pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][2];
        let drains = hook.as_str().is_some_and(|hook| hook.starts_with("kill -TERM 1 && while kill -0 1;"));
        if container.program() == "lora-worker" && !drains {
            found.push(format!("{}: does not drain", container.location));
        }
    }
    found
}

fn stateful_set<'a>(kustomization: &'a mut Kustomization, name: &str) -> &'a mut Value {
    let named = |object: &&mut Value| object["kind"] == "StatefulSet" && object["metadata"]["name"] == name;
    kustomization.objects.iter_mut().find(named).unwrap()
}
