//! The output of a program to a terminal.

use std::fs::File;
use std::io::Read;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::process::WAIT_TIMEOUT;

/// Runs `command` with a terminal of `columns` columns as its stdout and returns its output. The
/// command must succeed.
pub fn on_terminal(mut command: Command, columns: u16) -> String {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags).unwrap();
    unlockpt(&terminal).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let mut child = command.stdout(ioctl_tiocgptpeer(&terminal, flags).unwrap()).spawn().unwrap();
    // The command also has the other end of the terminal open.
    drop(command);
    let mut terminal = File::from(terminal);
    let (mut written, mut piece) = (Vec::new(), [0; 4096]);
    let limit = Timespec::try_from(WAIT_TIMEOUT).unwrap();
    loop {
        assert!(
            poll(&mut [PollFd::new(&terminal, PollFlags::IN)], Some(&limit)).unwrap() > 0,
            "the program wrote nothing for {WAIT_TIMEOUT:?}"
        );
        // An error means that the other end is closed.
        match terminal.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(read) => written.extend(&piece[..read]),
        }
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(written).unwrap().replace("\r\n", "\n")
}
