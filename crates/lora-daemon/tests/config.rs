//! Settings from file, environment and flags.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::path::PathBuf;

use lora_daemon::config::{known_keys, load_from};
use lora_spec::FieldError;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    state_dir: PathBuf,
    roots: Vec<PathBuf>,
    grpc: Listen,
    http: Listen,
    workers: Workers,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listen {
    listen: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Workers {
    heartbeat_seconds: f64,
    count: u32,
    strict: bool,
    color: Color,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Color {
    Red,
    Green,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            state_dir: "/var".into(),
            roots: Vec::new(),
            grpc: Listen { listen: "0.0.0.0:1".into() },
            http: Listen { listen: "0.0.0.0:2".into() },
            workers: Workers::default(),
        }
    }
}

impl Default for Workers {
    fn default() -> Self {
        Self { heartbeat_seconds: 2.0, count: 1, strict: false, color: Color::Red }
    }
}

/// The sources of settings, as given.
#[derive(Default)]
struct Sources {
    file: Option<&'static str>,
    variables: &'static [(&'static str, &'static str)],
    sets: &'static [&'static str],
}

impl Sources {
    fn load(&self) -> Result<Settings, String> {
        self.load_checked(|_| Ok(()))
    }

    /// Loads and checks the settings. Errors have FILE instead of the path of the file.
    fn load_checked(
        &self,
        check: impl FnOnce(&Settings) -> Result<(), FieldError>,
    ) -> Result<Settings, String> {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("settings.toml");
        let file = self.file.map(|text| {
            std::fs::write(&path, text).unwrap();
            path.as_path()
        });
        let variables = self.variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let sets: Vec<String> = self.sets.iter().map(|set| set.to_string()).collect();
        load_from(file, variables, &sets, check).map_err(|error| {
            let text = error.to_string();
            assert!(!text.contains('\n'), "more than one line: {text}");
            text.replace(&format!("{}", path.display()), "FILE")
        })
    }

    fn error(&self) -> String {
        self.load().unwrap_err()
    }
}

fn file(text: &'static str) -> Sources {
    Sources { file: Some(text), ..Sources::default() }
}

fn variable(variable: &'static [(&'static str, &'static str)]) -> Sources {
    Sources { variables: variable, ..Sources::default() }
}

fn set(sets: &'static [&'static str]) -> Sources {
    Sources { sets, ..Sources::default() }
}

#[test]
fn defaults_apply_without_settings() {
    assert_eq!(Sources::default().load().unwrap(), Settings::default());
    assert_eq!(file("# nothing\n[workers]\n").load().unwrap(), Settings::default());
}

#[test]
fn flags_override_variables_and_variables_override_the_file() {
    let sources = Sources {
        file: Some("state_dir = \"/file\"\n[workers]\nheartbeat_seconds = 3\ncount = 3\ncolor = \"green\"\n"),
        variables: &[("LORA__WORKERS__COUNT", "4"), ("LORA__STATE_DIR", "/variable")],
        sets: &["workers.strict=true", "state_dir=/flag", "workers.count=5", "workers.count=6"],
    };
    let workers = Workers { heartbeat_seconds: 3.0, count: 6, strict: true, color: Color::Green };
    assert_eq!(
        sources.load().unwrap(),
        Settings { state_dir: "/flag".into(), workers, ..Settings::default() }
    );
    let below = Sources { sets: &[], ..sources };
    assert_eq!(
        (below.load().unwrap().workers.count, below.load().unwrap().state_dir),
        (4, "/variable".into())
    );
}

#[test]
fn variables_and_flags_are_parsed_as_the_settings_type() {
    let sources = variable(&[
        ("LORA__ROOTS", "/a, /b,/c"),
        ("LORA__GRPC__LISTEN", ""),
        ("LORA__WORKERS__HEARTBEAT_SECONDS", "5"),
        ("LORA__STATE_DIR", "1e5"),
        ("LORA__WORKERS__COLOR", "green"),
    ]);
    let settings = sources.load().unwrap();
    assert_eq!(settings.roots, [PathBuf::from("/a"), "/b".into(), "/c".into()]);
    assert_eq!(settings.grpc.listen, "");
    assert_eq!(settings.workers.heartbeat_seconds, 5.0);
    assert_eq!(settings.state_dir, PathBuf::from("1e5"));
    assert_eq!(settings.workers.color, Color::Green);
    assert!(set(&["roots="]).load().unwrap().roots.is_empty());
    assert_eq!(set(&["grpc.listen = a=b"]).load().unwrap().grpc.listen, "a=b");
}

#[test]
fn unrelated_variables_are_ignored() {
    let sources = variable(&[
        ("LORA_COORDINATOR_PORT", "tcp://10.0.0.1:7400"),
        ("LORA_COORDINATOR_SERVICE_HOST", "10.0.0.1"),
        ("LORA_COORDINATOR_PORT_7400_TCP", "tcp://10.0.0.1:7400"),
        ("LORA_", "x"),
        ("lora__workers__count", "7"),
        ("PATH", "/bin"),
    ]);
    assert_eq!(sources.load().unwrap(), Settings::default());
}

#[test]
fn unknown_keys_get_a_suggestion() {
    assert_eq!(
        file("state_dir = \"/x\"\n\n[workers]\nhartbeat_seconds = 1\n").error(),
        "FILE:4: workers.hartbeat_seconds: is not a setting; did you mean workers.heartbeat_seconds?"
    );
    assert_eq!(
        variable(&[("LORA__GRPC__LISTN", "x")]).error(),
        "environment variable LORA__GRPC__LISTN: grpc.listn: is not a setting; \
         did you mean LORA__GRPC__LISTEN?"
    );
    assert_eq!(
        set(&["htp.listen=x"]).error(),
        "--set htp.listen=x: htp.listen: is not a setting; did you mean http.listen?"
    );
    assert_eq!(
        set(&["count=3"]).error(),
        "--set count=3: count: is not a setting; did you mean workers.count?"
    );
    assert_eq!(
        file("[http]\nport = 5\n").error(),
        "FILE:2: http.port: is not a setting; known settings: http.listen"
    );
}

#[test]
fn a_section_is_not_a_setting() {
    assert_eq!(
        file("\nworkers = 5\n").error(),
        "FILE:2: workers: is a section; its settings: workers.color, workers.count, \
         workers.heartbeat_seconds, workers.strict"
    );
    assert_eq!(set(&["http=off"]).error(), "--set http=off: http: is a section; its settings: http.listen");
    assert!(file("[wrkers.x]\n").error().starts_with("FILE:1: wrkers.x: is not a setting; known settings: "));
    assert!(file("[[workers]]\ncount = 1\n").error().starts_with("FILE:1: workers: is a section"));
    assert!(file("state_dir.x = 1\n").error().starts_with("FILE:1: state_dir.x: is not a setting"));
}

#[test]
fn type_errors_name_the_expected_type() {
    assert_eq!(
        file("[workers]\ncount = \"three\"\n").error(),
        "FILE:2: workers.count: is \"three\"; it must be a whole number"
    );
    assert_eq!(
        file("[workers]\ncount = 1.5\n").error(),
        "FILE:2: workers.count: is 1.5; it must be a whole number"
    );
    assert_eq!(
        file("[workers]\n\nstrict = \"yes\"\n").error(),
        "FILE:3: workers.strict: is \"yes\"; it must be true or false"
    );
    assert_eq!(file("state_dir = 5\n").error(), "FILE:1: state_dir: is 5; it must be a string in quotes");
    assert_eq!(
        file("roots = \"/a\"\n").error(),
        "FILE:1: roots: is \"/a\"; it must be a list of strings, such as [\"a\", \"b\"]"
    );
    assert_eq!(
        variable(&[("LORA__WORKERS__HEARTBEAT_SECONDS", "2s")]).error(),
        "environment variable LORA__WORKERS__HEARTBEAT_SECONDS: workers.heartbeat_seconds: is \"2s\"; \
         it must be a number"
    );
    assert_eq!(
        set(&["workers.strict=on"]).error(),
        "--set workers.strict=on: workers.strict: is \"on\"; it must be true or false"
    );
}

#[test]
fn invalid_values_are_named() {
    assert_eq!(
        set(&["workers.count=-1"]).error(),
        "--set workers.count=-1: workers.count: is -1: invalid value: integer `-1`, expected u32; \
         the default is 1"
    );
    assert_eq!(
        file("[workers]\ncolor = \"blue\"\n").error(),
        "FILE:2: workers.color: is \"blue\": unknown variant `blue`, expected `red` or `green`; \
         the default is \"red\""
    );
    assert!(file("roots = [1]\n").error().starts_with("FILE:1: roots: is [1]: invalid type: integer `1`"));
}

#[test]
fn check_errors_name_where_the_setting_was_set() {
    let refuse = |_: &Settings| Err(FieldError::new("workers.count", "is odd".into()));
    let refused = |sources: Sources| sources.load_checked(refuse).unwrap_err();
    assert_eq!(refused(file("[workers]\ncount = 3\n")), "FILE:2: workers.count: is odd");
    let both = Sources { variables: &[("LORA__WORKERS__COUNT", "3")], ..file("[workers]\ncount = 5\n") };
    assert_eq!(refused(both), "environment variable LORA__WORKERS__COUNT: workers.count: is odd");
    assert_eq!(refused(Sources::default()), "workers.count: is odd");
}

#[test]
fn invalid_toml_and_missing_files_are_reported() {
    assert_eq!(file("a = 1\nb = = 2\n").error(), "FILE:2: extra `=`, expected nothing");
    assert!(file("state_dir = \"/x\"\nstate_dir = \"/y\"\n").error().starts_with("FILE:2: duplicate key"));
    let error = file("[workers]\ncount = 99999999999999999999\n").error();
    assert!(error.starts_with("FILE:2: "), "{error}");
    assert_eq!(
        set(&["workers.count"]).error(),
        "--set workers.count: has no value; write --set section.key=value"
    );
    let missing = PathBuf::from("/missing/settings.toml");
    let error =
        load_from::<Settings>(Some(&missing), std::iter::empty(), &[], |_| Ok(())).unwrap_err().to_string();
    assert!(error.starts_with("/missing/settings.toml: No such file"), "{error}");
}

#[test]
fn known_keys_lists_every_setting() {
    assert_eq!(
        known_keys::<Settings>(),
        [
            "grpc.listen",
            "http.listen",
            "roots",
            "state_dir",
            "workers.color",
            "workers.count",
            "workers.heartbeat_seconds",
            "workers.strict"
        ]
    );
}
