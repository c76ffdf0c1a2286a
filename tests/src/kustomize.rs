//! The containers of `deploy/kubernetes`, read from its files. Other tests check the output of
//! `kubectl kustomize`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::container::{Container, Volume};
use crate::yaml::{documents, list, text};
use crate::{dockerfile, repository};

/// The objects that a kustomization generates, and the files of its ConfigMaps.
#[derive(Clone, Debug, Default)]
pub struct Kustomization {
    /// The directory, such as `overlays/cpu`.
    pub name: String,
    /// The objects, without the ConfigMaps.
    pub objects: Vec<Value>,
    /// Files by the name of the ConfigMap that contains them.
    pub config_maps: BTreeMap<String, Vec<PathBuf>>,
}

impl Kustomization {
    /// Reads the kustomization in directory `name` of `deploy/kubernetes`.
    ///
    /// # Panics
    /// If it uses a feature of Kustomize that this parser does not support.
    pub fn read(name: &str) -> Self {
        let mut read = read(&repository().join("deploy/kubernetes").join(name));
        name.clone_into(&mut read.name);
        read
    }

    /// Returns the objects that have pods.
    pub fn pods(&self) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(|object| !object["spec"]["template"].is_null())
    }

    /// Returns the containers of the pods.
    pub fn containers(&self) -> Vec<Container> {
        self.pods().map(|owner| self.container(owner)).collect()
    }

    /// Returns the ports of the Services as `NAME:PORT`.
    pub fn addresses(&self) -> Vec<String> {
        let services = self.objects.iter().filter(|object| object["kind"] == "Service");
        let ports =
            services.flat_map(|service| list(&service["spec"]["ports"]).map(move |port| (service, port)));
        ports
            .map(|(service, port)| format!("{}:{}", text(&service["metadata"]["name"]), port["port"]))
            .collect()
    }

    fn container(&self, owner: &Value) -> Container {
        let pod = &owner["spec"]["template"]["spec"];
        let [container] = &list(&pod["containers"]).collect::<Vec<_>>()[..] else {
            panic!("{}: must have exactly one container", owner["metadata"]["name"]);
        };
        let (image, _) = split_image(&text(&container["image"]));
        let stage = dockerfile::stages().into_iter().find(|stage| image == format!("lora-{}", stage.name));
        let image = stage.unwrap_or_else(|| panic!("no target of the Dockerfile for image {image}"));
        let ports: BTreeMap<String, u16> = list(&container["ports"])
            .map(|port| (text(&port["name"]), port["containerPort"].as_u64().unwrap().try_into().unwrap()))
            .collect();
        let probes =
            ["startupProbe", "readinessProbe", "livenessProbe"].map(|probe| &container[probe]["httpGet"]);
        let (mounts, volumes) = self.storage(owner, container);
        Container {
            location: format!("deploy/kubernetes/{}: {}", self.name, text(&owner["metadata"]["name"])),
            image,
            arguments: list(&container["args"]).map(text).collect(),
            environment: list(&container["env"])
                .map(|variable| (text(&variable["name"]), variable["value"].as_str().map(str::to_owned)))
                .collect(),
            mounts,
            volumes,
            probes: probes.map(|get| (ports[get["port"].as_str().unwrap()], text(&get["path"]))).into(),
            ports: ports.into_values().collect(),
            grace: Some(Duration::from_secs(pod["terminationGracePeriodSeconds"].as_u64().unwrap())),
            after: Vec::new(),
        }
    }

    /// Returns the mounted files of this repository and the writable volumes, by their paths in the
    /// container.
    fn storage(
        &self,
        owner: &Value,
        container: &Value,
    ) -> (BTreeMap<PathBuf, PathBuf>, BTreeMap<PathBuf, Volume>) {
        let (mut mounts, mut volumes) = (BTreeMap::new(), BTreeMap::new());
        let named = |list: &Value, at: &str, name: &str| {
            list.as_array()
                .and_then(|all| all.iter().find(|one| one.pointer(at).is_some_and(|n| n == name)).cloned())
        };
        for mount in list(&container["volumeMounts"]) {
            let (name, path) = (text(&mount["name"]), PathBuf::from(text(&mount["mountPath"])));
            let claim = named(&owner["spec"]["volumeClaimTemplates"], "/metadata/name", &name);
            let volume = named(&owner["spec"]["template"]["spec"]["volumes"], "/name", &name);
            match (claim, volume) {
                (Some(claim), None) => {
                    let bytes = gibibytes(&text(&claim["spec"]["resources"]["requests"]["storage"]));
                    volumes.insert(path, Volume::Persistent { name, bytes: Some(bytes) });
                }
                (None, Some(volume)) if volume["emptyDir"].is_object() => {
                    volumes.insert(path, Volume::Scratch);
                }
                (None, Some(volume)) => {
                    for file in &self.config_maps[volume["configMap"]["name"].as_str().unwrap()] {
                        mounts.insert(path.join(file.file_name().unwrap()), file.clone());
                    }
                }
                _ => panic!("{}: unsupported volume {name}", owner["metadata"]["name"]),
            }
        }
        (mounts, volumes)
    }
}

/// Returns the name and the tag of an image.
pub fn split_image(image: &str) -> (String, Option<String>) {
    match image.rsplit_once(':') {
        Some((name, tag)) => (name.to_owned(), Some(tag.to_owned())),
        None => (image.to_owned(), None),
    }
}

fn read(dir: &Path) -> Kustomization {
    let file: Value = documents(&dir.join("kustomization.yaml")).swap_remove(0);
    let mut made = Kustomization::default();
    for (key, value) in file.as_object().unwrap() {
        match key.as_str() {
            "apiVersion" | "kind" | "namespace" | "labels" => {}
            "resources" => list(value).map(|path| dir.join(text(path))).for_each(|path| made.add(&path)),
            "configMapGenerator" => {
                for map in list(value) {
                    let files = list(&map["files"]).map(|path| dir.join(text(path))).collect();
                    made.config_maps.insert(text(&map["name"]), files);
                }
            }
            // These are applied after everything else.
            "images" | "patches" => {}
            _ => panic!("{}: unsupported key {key}", dir.display()),
        }
    }
    for patch in list(&file["patches"]).flat_map(|patch| documents(&dir.join(text(&patch["path"])))) {
        let same = |object: &&mut Value| {
            object["kind"] == patch["kind"] && object["metadata"]["name"] == patch["metadata"]["name"]
        };
        let patched = made.objects.iter_mut().find(same).unwrap();
        merge(patched, &patch);
    }
    for image in list(&file["images"]) {
        let pods = made
            .objects
            .iter_mut()
            .filter_map(|object| object.pointer_mut("/spec/template/spec/containers/0/image"));
        for current in pods.filter(|current| **current == image["name"]) {
            let name = image["newName"].as_str().unwrap_or(image["name"].as_str().unwrap());
            *current = format!("{name}:{}", text(&image["newTag"])).into();
        }
    }
    made
}

impl Kustomization {
    fn add(&mut self, path: &Path) {
        if path.is_dir() {
            let below = read(path);
            self.objects.extend(below.objects);
            self.config_maps.extend(below.config_maps);
        } else {
            self.objects.extend(documents(path));
        }
    }
}

/// A strategic merge: maps are merged by key, lists of named items or mounts by name or mount path,
/// and any other value is replaced.
fn merge(target: &mut Value, patch: &Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(target.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(target), Value::Array(patch)) if patch.iter().all(|item| key(item).is_some()) => {
            for item in patch {
                match target.iter_mut().find(|one| key(one) == key(item)) {
                    Some(one) => merge(one, item),
                    None => target.push(item.clone()),
                }
            }
        }
        (target, patch) => *target = patch.clone(),
    }
}

fn key(item: &Value) -> Option<&Value> {
    item.get("mountPath").or(item.get("name"))
}

fn gibibytes(text: &str) -> u64 {
    text.strip_suffix("Gi").unwrap().parse::<u64>().unwrap() << 30
}
