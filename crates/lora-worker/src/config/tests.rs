use std::collections::BTreeSet;

use lora_daemon::config::{known_keys, load_from};

use super::*;

const FILE: &str = include_str!("../../../../configs/worker.toml");

fn check(change: impl FnOnce(&mut Config)) -> Result<(), String> {
    let mut config = Config::default();
    change(&mut config);
    config.check().map_err(|error| error.to_string())
}

fn error(change: impl FnOnce(&mut Config)) -> String {
    check(change).unwrap_err()
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
            assert!(keys.insert(format!("{section}{key}")), "{section}{key} occurs twice");
        }
        above = line;
    }
    assert_eq!(keys, known_keys::<Config>().into_iter().collect());
}

#[test]
fn defaults_are_valid() {
    let config: Config = load_from(None, std::iter::empty(), &[], Config::check).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.drain_timeout(), Duration::from_secs(120));
    assert_eq!(config.orphan_timeout(), Duration::from_secs(1800));
}

#[test]
fn the_default_name_is_the_host_name() {
    let mut config = Config::default();
    assert_eq!(config.worker_name(), rustix::system::uname().nodename().to_str().unwrap());
    config.name = "w-1.example".into();
    assert_eq!(config.worker_name(), "w-1.example");
    assert_eq!(config.check(), Ok(()));
}

#[test]
fn devices_and_collectives_are_words() {
    let set = |text: &str| load_from(None, std::iter::empty(), &[text.to_owned()], Config::check);
    let config: Config = set("device=cuda:1").unwrap();
    assert_eq!(config.device, DeviceSpec::Cuda(1));
    let config: Config = set("collective=tcp").unwrap();
    assert_eq!(config.collective, Collective::Tcp);
    let error = set("device=gpu").unwrap_err().to_string();
    assert!(error.contains("device: is \"gpu\": must be auto, cpu, cuda, or cuda:N"), "{error}");
    let error = set("collective=gloo").unwrap_err().to_string();
    assert!(error.contains("collective: is \"gloo\"") && error.contains("`nccl`"), "{error}");
}

#[test]
fn lists_are_comma_separated_in_the_environment() {
    let variable = ("LORA__MODEL_ROOTS".to_owned(), "/models, /mnt/more".to_owned());
    let config: Config = load_from(None, std::iter::once(variable), &[], Config::check).unwrap();
    assert_eq!(config.model_roots, [PathBuf::from("/models"), "/mnt/more".into()]);
}

#[test]
fn errors_name_the_setting() {
    assert_eq!(
        error(|c| c.name = "two words".into()),
        "name: is \"two words\"; it must be at most 128 letters, digits, `-`, `_` and `.`"
    );
    for url in ["coordinator:7400", "https://coordinator:7400", "http://", "", "http://a b", "ftp://x"] {
        assert_eq!(
            error(|c| c.coordinator = url.into()),
            format!(
                "coordinator: is {url:?}; it must be an http URL with a host, such as http://coordinator:7400"
            )
        );
    }
    assert_eq!(error(|c| c.cache_dir = "".into()), "cache_dir: is empty; it must be a directory");
    assert_eq!(
        error(|c| c.model_roots = vec!["/models".into(), "more".into()]),
        "model_roots: has \"more\"; it must be an absolute path"
    );
    assert_eq!(
        error(|c| c.drain_timeout_seconds = 0.0),
        "drain_timeout_seconds: is 0; it must be above 0 and at most 31536000"
    );
    assert!(error(|c| c.orphan_timeout_seconds = f64::NAN).starts_with("orphan_timeout_seconds: is NaN"));
    assert!(
        error(|c| c.peer.listen = "7410".into()).starts_with("peer.listen: is \"7410\"; it must be an IP")
    );
    for address in ["worker", ":7410", "worker:0", "worker:70000"] {
        assert!(
            error(|c| c.peer.advertise_address = address.into()).starts_with("peer.advertise_address: is ")
        );
    }
    assert!(error(|c| c.http.listen = "off".into()).starts_with("http.listen: is \"off\""));
    assert!(error(|c| c.log.filter = "a=b=c".into()).starts_with("log.filter: "));
    assert_eq!(error(|c| c.cache.max_bytes = 0), "cache.max_bytes: is 0; it must be at least 1");
}

#[test]
fn addresses_may_be_names_and_ipv4_or_ipv6() {
    let result = check(|c| {
        c.coordinator = "http://[::1]:7400".into();
        c.peer = PeerConfig { listen: "[::]:0".into(), advertise_address: "[fd00::1]:7410".into() };
        c.http.listen = String::new();
    });
    assert_eq!(result, Ok(()));
}
