//! The choice of the collective backend from the capabilities of every rank, and the ranks'
//! agreement on it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod common;

use common::{TEST_TIMEOUT, on_ranks};
use lora_collective::CollectiveError;
use lora_collective::backend_choice::{Capabilities, Collective, CollectiveBackend, agree, choose};

fn capabilities(gpus: &[&str]) -> Vec<Capabilities> {
    let rank_capabilities = |gpu: &&str| Capabilities {
        wanted: Collective::Auto,
        nccl: Ok(22_809),
        gpu: (*gpu).to_owned(),
        host_id: None,
        shares_gpu: false,
        gpus: 1,
    };
    gpus.iter().map(rank_capabilities).collect()
}

/// Returns the choice for `capabilities`, and the choice if rank 1 requires NCCL.
fn choices(mut capabilities: Vec<Capabilities>) -> (CollectiveBackend, Result<CollectiveBackend, String>) {
    let chosen = choose(&capabilities).unwrap();
    capabilities[1].wanted = Collective::Nccl;
    (chosen, choose(&capabilities))
}

fn change(mut capabilities: Vec<Capabilities>, change: impl Fn(&mut [Capabilities])) -> Vec<Capabilities> {
    change(&mut capabilities);
    capabilities
}

/// Sets the host ids of [`shared_gpu_variables`](lora_collective::shared_gpu_variables).
fn own_host_ids(capabilities: &mut [Capabilities]) {
    for (index, rank_capabilities) in capabilities.iter_mut().enumerate() {
        rank_capabilities.host_id = Some(format!("shared-gpu-{index}"));
    }
}

#[test]
fn nccl_is_chosen_if_all_ranks_support_it() {
    assert_eq!(
        choices(capabilities(&["a", "b", "c"])),
        (CollectiveBackend::Nccl, Ok(CollectiveBackend::Nccl))
    );
    assert_eq!(choose(&capabilities(&["a"])), Ok(CollectiveBackend::Nccl));
    let shared = change(capabilities(&["a", "b", "a"]), |capabilities| {
        capabilities.iter_mut().for_each(|it| (it.nccl, it.shares_gpu) = (Ok(23_007), true));
    });
    assert_eq!(choices(shared), (CollectiveBackend::Nccl, Ok(CollectiveBackend::Nccl)));
}

#[test]
fn ranks_with_distinct_host_ids_share_a_gpu_with_any_nccl_version() {
    for version in [22_100, 22_809, 23_003] {
        let shared = change(capabilities(&["a", "a", "a"]), |it| {
            own_host_ids(it);
            it.iter_mut().for_each(|it| it.nccl = Ok(version));
        });
        assert_eq!(choices(shared), (CollectiveBackend::Nccl, Ok(CollectiveBackend::Nccl)), "NCCL {version}");
    }
    // A rank without a host id has the id of its host.
    let one = change(capabilities(&["a", "a"]), |it| it[1].host_id = Some("shared-gpu-1".to_owned()));
    assert_eq!(choose(&one), Ok(CollectiveBackend::Nccl));
    let same = change(capabilities(&["a", "b", "a"]), |it| {
        it.iter_mut().for_each(|it| it.host_id = Some("node".to_owned()));
        it[0].wanted = Collective::Nccl;
    });
    let error = choose(&same).unwrap_err();
    assert!(error.contains("ranks 0 and 2 share a GPU"), "{error}");
}

/// Capabilities that do not allow NCCL, with the reason.
fn obstacles() -> Vec<(Vec<Capabilities>, &'static str)> {
    let new = |capabilities: &mut [Capabilities]| capabilities.iter_mut().for_each(|it| it.nccl = Ok(23_000));
    vec![
        (
            change(capabilities(&["a", "b"]), |it| it[0].wanted = Collective::Tcp),
            "rank 0 has the setting collective = tcp; it must be auto or nccl",
        ),
        (
            change(capabilities(&["a", "b"]), |it| it[1].nccl = Err("it is missing; install it".to_owned())),
            "rank 1 cannot use NCCL: it is missing; install it",
        ),
        (
            change(capabilities(&["a", "b", "c"]), |it| it[2].nccl = Ok(23_007)),
            "rank 0 has NCCL 2.28.9 and rank 2 has NCCL 2.30.7; all must have the same version",
        ),
        (
            change(capabilities(&["a", "b", "b"]), |it| it[2].shares_gpu = true),
            "ranks 1 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 with NCCL 2.30.0 or newer (it is \
             2.28.9)",
        ),
        (
            change(capabilities(&["a", "b", "a"]), new),
            "ranks 0 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 (rank 0 does not have it)",
        ),
        (
            change(capabilities(&["a", "b", "a"]), |it| {
                new(it);
                it[0].shares_gpu = true;
            }),
            "ranks 0 and 2 share a GPU; each process must have its own NCCL_HOSTID (loractl run sets it \
             with --collective nccl), or NCCL_MULTI_RANK_GPU_ENABLE=1 (rank 1 does not have it)",
        ),
    ]
}

#[test]
fn tcp_between_several_gpus_is_reported_as_a_fallback() {
    for (capabilities, obstacle) in obstacles() {
        let text =
            format!("gradients travel between the GPUs over TCP, which is slower than NCCL: {obstacle}");
        let demanded = format!("rank 1 requires the collective nccl, but {obstacle}");
        assert_eq!(choices(capabilities), (CollectiveBackend::Fallback(text), Err(demanded)));
    }
}

#[test]
fn tcp_is_not_a_fallback_on_one_gpu_or_if_configured() {
    let on_one_gpu = |capabilities: Vec<Capabilities>| {
        change(capabilities, |it| it.iter_mut().for_each(|it| it.gpu = "a".to_owned()))
    };
    for (capabilities, obstacle) in obstacles() {
        assert_eq!(choose(&on_one_gpu(capabilities)), Ok(CollectiveBackend::Tcp), "{obstacle}");
    }
    let configured = change(capabilities(&["a", "b"]), |it| {
        it.iter_mut().for_each(|it| it.wanted = Collective::Tcp);
    });
    assert_eq!(choose(&configured), Ok(CollectiveBackend::Tcp));
    // The ranks share a GPU on a machine that has several GPUs.
    let crowded = change(capabilities(&["a", "a"]), |it| it.iter_mut().for_each(|it| it.gpus = 4));
    assert!(matches!(choose(&crowded), Ok(CollectiveBackend::Fallback(_))));
}

#[test]
fn ranks_agree_on_the_choice() {
    let choice = |wanted: fn(usize) -> Collective| {
        on_ranks(3, TEST_TIMEOUT, |mut group| {
            let rank = group.rank();
            let rank_capabilities =
                Capabilities { wanted: wanted(rank), ..capabilities(&["a", "b", "c"])[rank].clone() };
            let agreed = agree(&mut group, &rank_capabilities);
            group.barrier().unwrap();
            agreed
        })
    };
    assert!(
        choice(|_| Collective::Auto).into_iter().all(|agreed| agreed.unwrap() == CollectiveBackend::Nccl)
    );
    let one_tcp = choice(|rank| [Collective::Auto, Collective::Tcp, Collective::Auto][rank]);
    let one_tcp: Vec<CollectiveBackend> = one_tcp.into_iter().map(Result::unwrap).collect();
    assert!(
        matches!(&one_tcp[0], CollectiveBackend::Fallback(text) if text.contains("rank 1")),
        "{one_tcp:?}"
    );
    assert!(one_tcp.iter().all(|choice| *choice == one_tcp[0]), "{one_tcp:?}");
    for agreed in choice(|rank| [Collective::Nccl, Collective::Auto, Collective::Tcp][rank]) {
        let error = agreed.unwrap_err();
        assert!(matches!(error, CollectiveError::NoNccl(_)), "{error}");
        let expected = "rank 0 requires the collective nccl, but rank 2 has the setting collective = tcp; \
                        it must be auto or nccl";
        assert_eq!(error.to_string(), expected);
        assert!(error.suspects().is_empty());
    }
}

#[test]
fn malformed_capabilities_fail_their_rank() {
    let errors = on_ranks(2, TEST_TIMEOUT, |mut group| {
        let rank_capabilities = &capabilities(&["a"])[0];
        match group.rank() {
            0 => agree(&mut group, rank_capabilities).unwrap_err(),
            _ => group.all_gather(b"hm").and_then(|_| group.barrier()).unwrap_err(),
        }
    });
    let expected = "rank 1 sent a malformed frame: invalid capabilities";
    assert!(errors[0].to_string().contains(expected), "{}", errors[0]);
    assert_eq!((errors[0].suspects(), errors[1].suspects()), (vec![1], vec![1]));
}

#[test]
fn collective_names_round_trip() {
    for (text, collective) in
        [("auto", Collective::Auto), ("nccl", Collective::Nccl), ("tcp", Collective::Tcp)]
    {
        assert_eq!(text.parse(), Ok(collective));
        assert_eq!(collective.to_string(), text);
    }
    let error = "mpi".parse::<Collective>().unwrap_err();
    assert_eq!(error.to_string(), "invalid collective `mpi`: must be auto, nccl or tcp");
}
