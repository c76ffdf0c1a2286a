//! A container as the compose file, a manifest or an image describes it, and its process on this machine instead.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lora_daemon::config::load_from;
use lora_spec::FieldError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::dockerfile::Stage;
use crate::service::without_settings;

/// A container of one of this repository's images.
#[derive(Clone, Debug)]
pub struct Container {
    /// Where it is described, such as `docker-compose.yml: worker-0`.
    pub location: String,
    /// The target of the Dockerfile that is its image.
    pub image: Stage,
    /// What the program gets; the program is the image's entry point.
    pub arguments: Vec<String>,
    /// Its variables; none: a value that only a running pod has.
    pub environment: BTreeMap<String, Option<String>>,
    /// Files and directories of this repository that it reads, by their paths in the container.
    pub mounts: BTreeMap<PathBuf, PathBuf>,
    /// Directories that it may write to, by their paths in the container.
    pub volumes: BTreeMap<PathBuf, Volume>,
    /// Ports that are named or published.
    pub ports: Vec<u16>,
    /// Port and path of what asks it over HTTP how it is.
    pub probes: Vec<(u16, String)>,
    /// From the request to end until it is killed, where that is said.
    pub grace: Option<Duration>,
    /// Containers that must be healthy before it starts.
    pub after: Vec<String>,
}

/// A place for a container's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// Is kept when the container is replaced.
    Persistent {
        /// Its name.
        name: String,
        /// Its size in bytes, where that is said.
        bytes: Option<u64>,
    },
    /// Goes with the container.
    Scratch,
}

impl Container {
    /// What an image is without further words.
    pub fn from_image(image: Stage) -> Self {
        let kept = |path: &str| Volume::Persistent { name: path.replace('/', "-"), bytes: None };
        Self {
            location: format!("deploy/docker/Dockerfile: {}", image.name),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            mounts: BTreeMap::new(),
            volumes: image.all("VOLUME").map(|path| (PathBuf::from(path), kept(path))).collect(),
            ports: image
                .all("EXPOSE")
                .flat_map(str::split_whitespace)
                .map(|port| port.parse().unwrap())
                .collect(),
            probes: image.healthcheck().into_iter().collect(),
            grace: None,
            after: Vec::new(),
            image,
        }
    }

    /// The program that runs in it: the first word of the image's entry point.
    pub fn program(&self) -> String {
        self.image.entrypoint().swap_remove(0)
    }

    /// Where a file that it reads lies on this machine.
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let (mount, here) = self.mounts.iter().find(|(mount, _)| path.starts_with(mount))?;
        let below = path.strip_prefix(mount).unwrap();
        Some(if below.as_os_str().is_empty() { here.clone() } else { here.join(below) })
    }

    /// A daemon's settings by their keys, `section.key`: the defaults, its file, its variables, its flags.
    ///
    /// # Errors
    /// What the daemon would say.
    pub fn settings(&self) -> Result<BTreeMap<String, Value>, String> {
        match self.program().as_str() {
            "lora-coordinator" => self.load(lora_coordinator::Config::check),
            "lora-worker" => self.load(lora_worker::Config::check),
            program => Err(format!("{program} is no daemon")),
        }
    }

    fn load<T: DeserializeOwned + Serialize + Default>(
        &self,
        check: impl FnOnce(&T) -> Result<(), FieldError>,
    ) -> Result<BTreeMap<String, Value>, String> {
        let file = match self.flag("--config").next() {
            Some(path) => Some(self.file(path).ok_or(format!("--config {path}: is not mounted"))?),
            None => None,
        };
        let sets: Vec<String> = self.flag("--set").map(str::to_owned).collect();
        let given = self.environment.iter();
        let variables =
            given.map(|(name, value)| (name.clone(), value.clone().unwrap_or("only-in-a-pod".into())));
        let settings =
            load_from(file.as_deref(), variables, &sets, check).map_err(|error| error.to_string())?;
        let mut leaves = BTreeMap::new();
        flatten("", serde_json::to_value(settings).unwrap(), &mut leaves);
        Ok(leaves)
    }

    fn flag<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.arguments.windows(2).filter(move |pair| pair[0] == name).map(|pair| pair[1].as_str())
    }

    /// Makes `program`, the program as built on this machine, what runs in the container: the same arguments and variables,
    /// and so the same configuration, in which
    /// - paths of files that it reads are those on this machine,
    /// - a volume is the directory of its name in `dir`,
    /// - the program listens on port 0 of 127.0.0.1,
    /// - `host:port` of another container is what `addresses` has for it.
    ///
    /// Variables of the tester's own that the program would read are removed.
    ///
    /// # Panics
    /// If a variable's value is known in a pod only, or names a container that `addresses` does not have.
    pub fn on_this_machine(
        &self,
        mut program: Command,
        dir: &Path,
        addresses: &BTreeMap<String, String>,
    ) -> Command {
        without_settings(&mut program);
        let entrypoint = self.image.entrypoint();
        for word in entrypoint.iter().skip(1).chain(&self.arguments) {
            program.arg(self.file(word).unwrap_or_else(|| word.into()));
        }
        for (name, value) in &self.environment {
            let value =
                value.as_ref().unwrap_or_else(|| panic!("{}: {name} is known in a pod only", self.location));
            let here = addresses.iter().fold(value.clone(), |text, (there, here)| text.replace(there, here));
            assert!(
                !value.contains("://") || here != *value,
                "{}: no address for {name}={value}",
                self.location
            );
            program.env(name, here);
        }
        for (key, value) in self.settings().unwrap_or_default() {
            let Some(value) = value.as_str() else { continue };
            let variable = format!("LORA__{}", key.to_uppercase().replace('.', "__"));
            if is_listen(&key) && !value.is_empty() {
                program.env(variable, "127.0.0.1:0");
            } else if let Some(Volume::Persistent { name, .. }) = self.volumes.get(Path::new(value)) {
                program.env(variable, dir.join(name));
            }
        }
        program
    }
}

/// Whether a setting is an address that its daemon listens on.
pub fn is_listen(key: &str) -> bool {
    key.ends_with(".listen")
}

fn flatten(key: &str, value: Value, leaves: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(section) => {
            for (name, value) in section {
                flatten(format!("{key}.{name}").trim_start_matches('.'), value, leaves);
            }
        }
        value => {
            leaves.insert(key.to_owned(), value);
        }
    }
}
