/* Runs inside a guest under measurement.
 *
 * probe tick PORT                  a byte to PORT each millisecond
 * probe write PORT FILE            a byte to PORT after each 4 KiB O_DIRECT|O_DSYNC write to FILE
 * probe churn DEVICE AT SIZE COUNT SEED
 *                                  COUNT random 64 KiB blocks of DEVICE's SIZE bytes from AT on
 *
 * A guest's clocks stand still while it is held, so nothing is timed in here: who reads the other
 * end of PORT stamps the bytes with the host's clock. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WRITE_BYTES 4096
#define WRITE_BLOCKS 1024
#define CHURN_BYTES 65536

static int opened(const char *path, int flags) {
    int file = open(path, flags, 0600);
    if (file < 0) {
        perror(path);
        exit(1);
    }
    return file;
}

static void *aligned(size_t size) {
    void *memory;
    if (posix_memalign(&memory, 4096, size))
        exit(1);
    memset(memory, 0x5a, size);
    return memory;
}

static uint64_t dice; /* xorshift64 */
static uint64_t next(void) {
    dice ^= dice << 13;
    dice ^= dice >> 7;
    return dice ^= dice << 17;
}

static void told(int port) {
    while (write(port, ".", 1) != 1)
        usleep(1000); /* nobody listens yet */
}

static void tick(const char *port_path) {
    int port = opened(port_path, O_WRONLY);
    struct timespec millisecond = {0, 1000000};
    for (;;) {
        nanosleep(&millisecond, NULL);
        told(port);
    }
}

static void write_on(const char *port_path, const char *path) {
    int port = opened(port_path, O_WRONLY);
    char *block = aligned(WRITE_BYTES);
    int file = opened(path, O_RDWR | O_CREAT);
    for (int number = 0; number < WRITE_BLOCKS; number++)
        if (write(file, block, WRITE_BYTES) != WRITE_BYTES)
            exit(1);
    fsync(file);
    file = opened(path, O_RDWR | O_DIRECT | O_DSYNC);
    dice = 88172645463325252u;
    for (;;) {
        memcpy(block, &dice, sizeof dice);
        if (pwrite(file, block, WRITE_BYTES, next() % WRITE_BLOCKS * WRITE_BYTES) != WRITE_BYTES)
            exit(1);
        told(port);
    }
}

static void churn(char **argument) {
    int device = opened(argument[0], O_RDWR | O_DIRECT);
    uint64_t at = strtoull(argument[1], NULL, 10), size = strtoull(argument[2], NULL, 10);
    uint64_t *block = aligned(CHURN_BYTES);
    dice = strtoull(argument[4], NULL, 10) * 2654435769u + 1;
    for (long left = atol(argument[3]); left; left--) {
        for (size_t word = 0; word < CHURN_BYTES / sizeof *block; word++)
            block[word] = next();
        if (pwrite(device, block, CHURN_BYTES, at + next() % (size / CHURN_BYTES) * CHURN_BYTES) < 0)
            exit(1);
    }
    fsync(device);
}

int main(int count, char **argument) {
    if (count == 3 && !strcmp(argument[1], "tick"))
        tick(argument[2]);
    else if (count == 4 && !strcmp(argument[1], "write"))
        write_on(argument[2], argument[3]);
    else if (count == 7 && !strcmp(argument[1], "churn"))
        churn(argument + 2);
    else
        return 2;
    return 0;
}
