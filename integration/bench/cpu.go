package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// Fields of a process's times in /proc/PID/stat, counted behind the name in parentheses, and the
// unit they are in, which Linux fixes for programs at a hundredth of a second (proc(5), time(7)).
const (
	firstTime = 11 // utime, stime, cutime, cstime: its own and its waited-for children's
	tick      = 10 * time.Millisecond
)

// processCPU is the CPU time that the processes and their finished children have used so far.
func processCPU(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		for _, f := range fields[firstTime : firstTime+4] {
			var ticks int64
			if _, err := fmt.Sscan(f, &ticks); err != nil {
				return 0, fmt.Errorf("stat of process %d: %w", pid, err)
			}
			sum += time.Duration(ticks) * tick
		}
	}
	return sum, nil
}

// machineCPU is the CPU time that the whole machine has spent working so far: everything but idling
// and waiting for disks, over all cores.
func machineCPU() (time.Duration, error) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(stat), "\n")
	var t [8]int64 // user nice system idle iowait irq softirq steal
	if _, err := fmt.Sscanf(line, "cpu %d %d %d %d %d %d %d %d", &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]); err != nil {
		return 0, fmt.Errorf("/proc/stat: %w", err)
	}
	return time.Duration(t[0]+t[1]+t[2]+t[5]+t[6]) * tick, nil
}

// cost is what one pull took.
type cost struct {
	wall, cpu, registry, machine time.Duration
}

func (c cost) String() string {
	return fmt.Sprintf("%6.2fs  (cpu %.2fs, registry %.2fs, rest of the machine %.2fs)",
		c.wall.Seconds(), c.cpu.Seconds(), c.registry.Seconds(), (c.machine - c.cpu - c.registry).Seconds())
}

// clock measures from start to stop.
type clock struct {
	pids, registry []int
	begin          time.Time
	before         cost
}

func startClock(pids, registry []int) (*clock, error) {
	c := &clock{pids: pids, registry: registry}
	var err error
	c.before, err = c.read()
	c.begin = time.Now()
	return c, err
}

func (c *clock) stop() (cost, error) {
	wall := time.Since(c.begin)
	now, err := c.read()
	return cost{wall, now.cpu - c.before.cpu, now.registry - c.before.registry, now.machine - c.before.machine}, err
}

func (c *clock) read() (now cost, err error) {
	if now.cpu, err = processCPU(c.pids...); err != nil {
		return now, err
	}
	if now.registry, err = processCPU(c.registry...); err != nil {
		return now, err
	}
	now.machine, err = machineCPU()
	return now, err
}
