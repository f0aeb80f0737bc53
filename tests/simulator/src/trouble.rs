//! Whoever makes trouble: every 20 ms of the simulated clock it looks whether something shall go wrong.

use pillion_ssd::device::faulty::Crash;

use crate::{
    net::{Down, End, Next, Up},
    plan::{Fault, MS},
    sidecar::tier::disk_of,
    world::{TROUBLE_NS, World},
};

impl World {
    pub(crate) fn trouble(&mut self) {
        for fault in Fault::ALL {
            if self.trouble_dice.permille(self.plan.rate(*fault)) {
                self.inject(*fault);
            }
        }
        self.kill_the_mute();
        self.steps_left = self.steps_left.saturating_sub(1);
        if self.steps_left > 0 {
            self.net.after(TROUBLE_NS, Next::Trouble);
        }
    }

    fn inject(&mut self, fault: Fault) {
        let sidecar = self.trouble_dice.below(self.plan.sidecars as u64) as usize;
        let engine = self.trouble_dice.below(self.plan.engines.len() as u64) as usize;
        let is_running = self.sidecars[sidecar].is_some();
        match fault {
            Fault::SidecarKilled if is_running => {
                self.net.injected(fault);
                self.kill_and_restart(sidecar);
            }
            Fault::SidecarStopped if is_running => {
                self.net.injected(fault);
                self.drain(sidecar);
            }
            Fault::SidecarPaused if is_running && !self.is_paused(sidecar) => {
                self.net.injected(fault);
                let ns = self.trouble_dice.pick(&[30, 120, 500]) * MS;
                self.pause(sidecar, ns);
            }
            Fault::PowerLost => self.lose_power(),
            Fault::EngineKilled => {
                self.net.injected(fault);
                self.replace_engine(engine);
            }
            Fault::EnginePaused => {
                self.net.injected(fault);
                let ns = self.trouble_dice.pick(&[30, 120, 500]) * MS;
                self.pause(self.plan.sidecars + engine, ns);
            }
            Fault::ConnectionBroken => self.break_connection(engine),
            Fault::CacheReset => self.engines[engine].reset(&mut self.net),
            Fault::WorkerSleeps => {
                self.net.injected(fault);
                self.engines[engine].sleep(&mut self.net);
            }
            Fault::PoolRots if is_running => self.rot_pool(sidecar),
            Fault::DiskRots => self.rot_disk(sidecar),
            Fault::DiskBreaks => self.break_disk(sidecar),
            Fault::DiskFull => self.fill_disk(sidecar),
            Fault::DiskHangs => {
                self.net.injected(fault);
                self.disk_until = self.net.now + self.trouble_dice.within(20, 400) * MS;
            }
            Fault::NeighboursPart => self.part_some(sidecar),
            Fault::NetworkSlow => {
                self.net.injected(fault);
                let ns = self.trouble_dice.within(20, 200) * MS;
                self.net.slow_down(ns);
            }
            // These happen where they can: in copies, in disks, in requests; or not to what is not there.
            _ => {}
        }
    }

    fn start_later(&mut self, sidecar: usize, most_ns: u64) {
        let delay = self.trouble_dice.within(MS, most_ns);
        self.net.after(delay, Next::Start { sidecar });
    }

    fn kill_and_restart(&mut self, sidecar: usize) {
        self.kill(sidecar);
        // What came for it while it stood still is for nobody now.
        self.resume(sidecar);
        self.start_later(sidecar, 150 * MS);
    }

    /// I3: a sidecar that is mute for longer than the grace, while it may still write an engine's blocks, is killed.
    fn kill_the_mute(&mut self) {
        for sidecar in 0..self.plan.sidecars {
            let late = self.net.now.saturating_sub(self.plan.grace_ns);
            let overdue = self.engines.iter().any(|engine| engine.has_overdue_holds(sidecar, late));
            if overdue && self.is_paused(sidecar) {
                self.net.saw("mute sidecars killed", 1);
                self.kill_and_restart(sidecar);
            }
        }
    }

    fn lose_power(&mut self) {
        self.net.injected(Fault::PowerLost);
        for sidecar in 0..self.plan.sidecars {
            self.kill(sidecar);
            self.resume(sidecar);
            let how = match self.trouble_dice.below(4) {
                0 => Crash::LoseAll,
                1 => Crash::KeepAll,
                _ => Crash::Subset(self.trouble_dice.roll()),
            };
            let mut disk = disk_of(&self.disks[sidecar]);
            let full = disk.files_max;
            disk.crash(how);
            disk.files_max = full;
            drop(disk);
            self.oracle.disk(sidecar).doubtful = false;
            self.start_later(sidecar, 100 * MS);
        }
        for engine in 0..self.engines.len() {
            self.replace_engine(engine);
        }
    }

    fn replace_engine(&mut self, number: usize) {
        self.engines[number].die(&mut self.net);
        self.resume(self.plan.sidecars + number);
        self.engines[number] = self.engine(number);
    }

    /// Both ends live, and see the end of the stream.
    fn break_connection(&mut self, engine: usize) {
        let conns = self.engines[engine].conns();
        if conns.is_empty() {
            return;
        }
        self.net.injected(Fault::ConnectionBroken);
        let (rank, half, conn) = conns[self.trouble_dice.below(conns.len() as u64) as usize];
        let life = self.engines[engine].life;
        self.net.up(conn, Up::End);
        self.net.down(End::Engine { engine, life, rank, half }, conn.id, Down::End { in_order: false });
    }
}
