//! A container that the compose file, a manifest or an image describes, and its program as a
//! process on this machine.

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
    /// The location of its description, such as `docker-compose.yml: worker-0`.
    pub location: String,
    /// The target of the Dockerfile that builds its image.
    pub image: Stage,
    /// The arguments of the program. The program is the image's entry point.
    pub arguments: Vec<String>,
    /// Environment variables. A value of `None` is only known in a running pod.
    pub environment: BTreeMap<String, Option<String>>,
    /// Files and directories of this repository that it reads, by their paths in the container.
    pub mounts: BTreeMap<PathBuf, PathBuf>,
    /// Directories that it may write to, by their paths in the container.
    pub volumes: BTreeMap<PathBuf, Volume>,
    /// Ports that are named or published.
    pub ports: Vec<u16>,
    /// The ports and paths of its HTTP probes.
    pub probes: Vec<(u16, String)>,
    /// The time between the termination signal and the kill, if the description has it.
    pub grace: Option<Duration>,
    /// Containers that must be healthy before it starts.
    pub after: Vec<String>,
}

/// Storage for a container's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Volume {
    /// Storage that is kept when the container is replaced.
    Persistent {
        /// The name of the volume.
        name: String,
        /// The size in bytes, if the description has it.
        bytes: Option<u64>,
    },
    /// Storage that is removed with the container.
    Scratch,
}

impl Container {
    /// Creates the container of an image with the image's defaults.
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

    /// Returns the program of the container: the first word of the image's entry point.
    pub fn program(&self) -> String {
        self.image.entrypoint().swap_remove(0)
    }

    /// Returns the path on this machine of a file that the container reads.
    pub fn file(&self, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let (mount, local) = self.mounts.iter().find(|(mount, _)| path.starts_with(mount))?;
        let below = path.strip_prefix(mount).unwrap();
        Some(if below.as_os_str().is_empty() { local.clone() } else { local.join(below) })
    }

    /// Returns the settings of a daemon by their keys, `section.key`, from the defaults, its file,
    /// its environment variables and its flags.
    ///
    /// # Errors
    /// The error that the daemon would report.
    pub fn settings(&self) -> Result<BTreeMap<String, Value>, String> {
        match self.program().as_str() {
            "lora-coordinator" => self.load(lora_coordinator::Config::check),
            "lora-worker" => self.load(lora_worker::Config::check),
            program => Err(format!("{program} is not a daemon")),
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

    /// Returns the command that runs `program`, the program that was built on this machine, like
    /// the program in the container. It has the container's arguments and environment variables,
    /// and therefore its configuration, with these differences:
    ///
    /// - paths of files that the program reads are those on this machine,
    /// - a volume is the directory of its name in `dir`,
    /// - the program listens on port 0 of 127.0.0.1,
    /// - `host:port` of another container is replaced by its value in `addresses`.
    ///
    /// Environment variables of the test process that the program would read are removed.
    ///
    /// # Panics
    /// If the value of a variable is only known in a pod, or names a container that is not in
    /// `addresses`.
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
                value.as_ref().unwrap_or_else(|| panic!("{}: {name} is only known in a pod", self.location));
            let local = addresses.iter().fold(value.clone(), |text, (from, to)| text.replace(from, to));
            assert!(
                !value.contains("://") || local != *value,
                "{}: no address for {name}={value}",
                self.location
            );
            program.env(name, local);
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

/// Returns whether a setting is an address that its daemon listens on.
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
