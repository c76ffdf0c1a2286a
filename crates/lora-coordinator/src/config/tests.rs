use std::collections::BTreeSet;

use lora_daemon::config::{known_keys, load_from};

use super::*;

const FILE: &str = include_str!("../../../../configs/coordinator.toml");

fn error(change: impl FnOnce(&mut Config)) -> String {
    let mut config = Config::default();
    change(&mut config);
    config.check().unwrap_err().to_string()
}

#[test]
fn the_file_has_every_setting_with_its_default_and_a_comment() {
    assert_eq!(toml::from_str::<Config>(FILE).unwrap(), Config::default());
    let mut section = String::new();
    let mut keys = BTreeSet::new();
    let mut above = "";
    for line in FILE.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.replace(']', ".");
        } else if let Some((key, _)) = line.split_once(" = ").filter(|_| !line.starts_with('#')) {
            assert!(above.starts_with("# "), "{section}{key} has no comment");
            assert!(keys.insert(format!("{section}{key}")), "{section}{key} is listed twice");
        }
        above = line;
    }
    assert_eq!(keys, known_keys::<Config>().into_iter().collect());
}

#[test]
fn defaults_are_valid() {
    let config: Config = load_from(None, std::iter::empty(), &[], Config::check).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.limits.unreferenced(), Duration::from_secs(24 * 3600));
}

#[test]
fn invalid_values_are_refused_with_the_field_and_the_reason() {
    assert_eq!(error(|c| c.state_dir = "".into()), "state_dir: is empty; it must be a directory");
    assert_eq!(
        error(|c| c.grpc.listen = "localhost:7400".into()),
        "grpc.listen: is \"localhost:7400\"; it must be an IP address with a port, such as 0.0.0.0:7400"
    );
    assert!(error(|c| c.grpc.listen = String::new()).starts_with("grpc.listen: is \"\""));
    assert!(error(|c| c.http.listen = "7401".into()).starts_with("http.listen: is \"7401\""));
    assert!(error(|c| c.log.filter = "a=b=c".into()).starts_with("log.filter: "));
    assert_eq!(error(|c| c.limits.retained_steps = 0), "limits.retained_steps: is 0; it must be at least 1");
    assert_eq!(
        error(|c| c.workers.heartbeat_seconds = -1.0),
        "workers.heartbeat_seconds: is -1; it must be above 0 and at most 60"
    );
    assert!(error(|c| c.recovery.step_seconds = f64::NAN).starts_with("recovery.step_seconds: is NaN"));
    assert!(error(|c| c.limits.unreferenced_hours = f64::INFINITY).starts_with("limits.unreferenced_hours"));
    assert_eq!(
        error(|c| c.workers.lease_seconds = 4.0),
        "workers.lease_seconds: is 4; it must be more than twice workers.heartbeat_seconds, 2"
    );
}

#[test]
fn http_can_be_disabled() {
    let mut config = Config::default();
    config.http.listen = String::new();
    config.grpc.listen = "[::1]:0".into();
    assert_eq!(config.check(), Ok(()));
}
